"""Job, site and server files: what they say, and one clear line for what they should not."""

from __future__ import annotations

from pathlib import Path

import pytest

from partway.config import Policy, read_job, read_server, read_site
from partway.errors import ConfigError

JOB = """
[job]
name = "thyroid"
seed = 1
[network]
build = "partway.model.zoo:mlp"
arguments = { inputs = 29, hidden = [64, 16], classes = 7 }
cut = ["hidden.2"]
[training]
epochs = 20
optimizer = { name = "adam", lr = 3e-3 }
[roster]
svi = "0000000000000000000000000000000000000000000000000000000000000000"
other = "1111111111111111111111111111111111111111111111111111111111111111"
"""

SITE = """
[site]
name = "svi"
server = "partway.example.org:8443"
[data]
path = "records.csv"
[policy]
networks = ["partway.model.zoo:mlp"]
"""


def test_a_job() -> None:
    job = read_job(JOB)
    assert job.sites == ("other", "svi")
    assert (job.training.batch, job.training.sums, job.training.optimizer.lr) == (256, "blind", 3e-3)
    assert job.result.bottom == "sites"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("seed = 1", "sed = 1", "[job] has no key `sed`; did you mean `seed`?"),
        ("epochs = 20", "epoch = 20", "[training] has no key `epoch`; did you mean `epochs`?"),
        ("lr = 3e-3", "learning = 3e-3", "[training] optimizer has no key `learning`"),
        ("[roster]", "[rooster]", "has no key `rooster`; did you mean `roster`?"),
        ("epochs = 20", "epochs = '20'", "Expected `int`, got `str` - at `training.epochs`"),
        ("epochs = 20", "epochs = 0", "at `training.epochs`"),
        ("lr = 3e-3", "lr = 0", "at `training.optimizer.lr`"),
        ('"adam"', '"adamm"', "Invalid enum value 'adamm' - at `training.optimizer.name`"),
        ('name = "thyroid"', 'name = "../thyroid"', "at `job.name`"),
        ("[training]", '[training]\nconfiguration = "u_shaped"', "u_shaped needs 2 cut(s)"),
        ('cut = ["hidden.2"]', "", "missing required field `cut` - at `network`"),
        ("0" * 64, "0" * 63, "at `roster[...]`"),
        ("[training]", "[training", "not TOML"),
        ("[training]", "[evaluation]\ntrunk_travels = false\nsite_scores = true\n[training]", "needs trunk_travels"),
    ],
)
def test_a_wrong_job_gets_one_clear_line(before: str, after: str, words: str) -> None:
    assert before in JOB
    with pytest.raises(ConfigError) as caught:
        read_job(JOB.replace(before, after, 1), "job.toml")
    assert str(caught.value).startswith("job.toml: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_none() -> None:
    with pytest.raises(ConfigError, match="not TOML"):
        read_job(b"\xff\xfe")


def test_a_site(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    site = read_site(path)
    assert site.policy.labels_may_leave is False
    path.write_text(SITE.replace("[policy]", "[polcy]"))
    with pytest.raises(ConfigError, match=r"site\.toml: has no key `polcy`; did you mean `policy`\?"):
        read_site(path)
    path.write_text(SITE.replace(":8443", ""))
    with pytest.raises(ConfigError, match=r"at `site\.server`"):
        read_site(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_site(tmp_path / "none.toml")


def test_a_server(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text("[policy]\nnetworks = []\n")
    assert read_server(path).server.listen == "0.0.0.0:8443"


def test_a_policy_without_a_word_lets_nothing_optional_leave() -> None:
    policy = Policy()
    assert (policy.networks, policy.operators) == ([], [])
    assert not any((policy.labels_may_leave, policy.scores_may_leave, policy.bottom_to_everyone, policy.clear_sums))
    assert policy.least_sites == 3


def test_a_second_cut_makes_a_u_shape() -> None:
    """One line apart: labels leave with one cut, and stay with two."""
    job = read_job(JOB_OF_ONE_CUT)
    assert job.configuration == "vanilla"
    assert read_job(JOB_OF_ONE_CUT.replace('["hidden.0"]', '["hidden.0", "hidden.2"]')).configuration == "u_shaped"
    with pytest.raises(ConfigError, match=r"vanilla needs 1 cut\(s\), \[network\] cut names 2"):
        read_job(JOB_OF_ONE_CUT.replace('["hidden.0"]', '["hidden.0", "hidden.2"]') + 'configuration = "vanilla"\n')


JOB_OF_ONE_CUT = """
[job]
name = "study"
[network]
build = "partway.model.zoo:mlp"
arguments = { inputs = 4, hidden = [8, 8], classes = 2 }
cut = ["hidden.0"]
[training]
"""
