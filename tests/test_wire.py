"""Frames and tensors as `docs/wire-format.md` has them, pinned by literal bytes; and everything that is no frame."""

from __future__ import annotations

import math
import struct

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partway.data.schema import FAULTS
from partway.errors import PartwayError, PeerError
from partway.plan.plan import Copy
from partway.protocol.messages import (
    Bye,
    Counts,
    Fail,
    Greet,
    GroupKey,
    Head,
    Hello,
    Letter,
    LetterKind,
    Message,
    Mismatch,
    Offer,
    Post,
    Ready,
    Reason,
    Wrong,
)
from partway.wire import tensors as wire_tensors
from partway.wire.frames import LARGEST_HEADER, PREFIX, decode, encode, split
from partway.wire.tensors import DTYPES

HEAD = Head("svi", "server", bytes(range(32)), 0)
LETTER = Letter(7, Post(LetterKind.ACTIVATIONS, Copy("bottom", "svi"), Copy("trunk")))


def test_a_letter_byte_by_byte() -> None:
    frame = encode(HEAD, LETTER, {"x": torch.tensor([[1.0, 2.0]])})
    head = b"\x94\xa3svi\xa6server\xc4\x20" + bytes(range(32)) + b"\x00"
    letter = b"\x93\xa6letter\x07\x94\x01\x92\xa6bottom\xa3svi\x92\xa5trunk\xa0\x00"
    tensors = b"\x91\x93\xa1x\xa7float32\x92\x01\x02"
    header = b"\x93" + head + letter + tensors
    prefix = b"PWAY\x01\x00\x00\x00" + b"\x5f\x00\x00\x00\x00\x00\x00\x00" + b"\x08\x00\x00\x00\x00\x00\x00\x00"
    assert len(header) == 0x5F
    assert frame == prefix + header + bytes(128 - 24 - 0x5F) + b"\x00\x00\x80\x3f\x00\x00\x00\x40"


@pytest.mark.parametrize(
    ("message", "literal"),
    [
        (Greet("0.1.0"), b"\x92\xa5greet\xa50.1.0"),
        (Offer(b"job", b"pem"), b"\x93\xa5offer\xc4\x03job\xc4\x03pem"),
        (
            Hello("0.1.0", Counts(3, 2, 1), b"key", b"x", b"sig"),
            b"\x96\xa5hello\xa50.1.0\x94\x03\x02\x01\x00\xc4\x03key\xc4\x01x\xc4\x03sig",
        ),
        (GroupKey(b"sealed"), b"\x92\xa3key\xc4\x06sealed"),
        (Ready(bytes(32), b"c", b"s"), b"\x94\xa5ready\xc4\x20" + bytes(32) + b"\xc4\x01c\xc4\x01s"),
        (Bye(), b"\x91\xa3bye"),
        (Fail(Reason.LABELS, "svi"), b"\x94\xa4fail\x0e\xa3svi\x90"),
        (
            Fail(Reason.DATA, mismatches=(Mismatch(2, Wrong.UNIT), Mismatch(300, Wrong.CLASS))),
            b"\x94\xa4fail\x04\xa0\x92\x92\x02\x02\x92\xcd\x01\x2c\x03",
        ),
    ],
)
def test_every_message_byte_by_byte(message: Message, literal: bytes) -> None:
    frame = encode(Head("a", "b"), message)
    header = b"\x93\x94\xa1a\xa1b\xc4\x00\x00" + literal + b"\x90"
    assert frame[:24] == PREFIX.pack(b"PWAY", 1, len(header), 0)
    assert frame[24:] == header + bytes(-(24 + len(header)) % 64)
    assert decode(frame, "a").message == message


def test_every_tensor_begins_at_a_multiple_of_64() -> None:
    frame = encode(HEAD, LETTER, {"a": torch.tensor([1, 2, 3], dtype=torch.uint8), "b": torch.tensor([5])})
    assert frame[-(64 + 8) :] == b"\x01\x02\x03" + bytes(61) + b"\x05" + bytes(7)
    assert (len(frame) - 72) % 64 == 0


def test_kinds_and_reasons_keep_their_numbers() -> None:
    kinds = (
        "ACTIVATIONS",
        "LABELS",
        "SCORES",
        "GRADIENT",
        "SHARE",
        "SUM",
        "STATE",
        "EQUAL",
        "ACCOUNT",
        "TICK",
        "VERDICT",
        "SQUARE",
        "NORM",
    )
    assert [(k.name, int(k)) for k in LetterKind] == [(name, n) for n, name in enumerate(kinds, 1)]
    of_a_party = ("STOPPED", "PEER", "LOST", "DATA", "FAULT", "UNMATCHED")
    of_a_policy = (
        *("OPERATOR", "NETWORK", "NETWORK_SIZE", "ROSTER", "LABELS", "WIDTH", "EPOCHS"),
        *("SITES", "RECORDS", "SCORES", "CLEAR_SUM", "RESULT", "BATCHNORM", "EVALUATION", "REPEATED", "RELEASES"),
        *("PREDICTIONS", "EARLIER", "WEIGHTS", "SEGMENT"),
    )
    expected = [*enumerate(of_a_party, 1), *enumerate(of_a_policy, 10)]
    assert [(int(r), r.name) for r in Reason] == expected
    wrong = ("MISSING_COLUMN", "UNIT", "CLASS", "CATEGORY", "RANGE", "NUMBER", "NO_RECORDS")
    assert [(int(w), w.name) for w in Wrong] == [*enumerate(wrong, 1)]
    assert {w.name for w in Wrong} == FAULTS.keys()  # each has words


@pytest.mark.parametrize(
    "mismatches",
    [[[65536, 1]], [[-1, 1]], [[1, 8]], [[1]], [[1, 1, 1]], ["TSH"], [[1, "TSH 4.2"]], [[1, 1]] * (2**13 + 1)],
)
def test_a_mismatch_is_two_numbers_and_nothing_else(mismatches: list) -> None:
    sound = encode(HEAD, Fail(Reason.DATA, mismatches=(Mismatch(1, Wrong.UNIT),)))
    assert decode(sound, "svi").message.mismatches == ((1, Wrong.UNIT),)
    header = msgspec.msgpack.encode([HEAD, ["fail", 4, "", mismatches], []])
    frame = PREFIX.pack(b"PWAY", 1, len(header), 0) + header
    with pytest.raises(PeerError):
        decode(frame + bytes(-len(frame) % 64), "svi")


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=5),
    st.integers(0, 2**32),
)
def test_tensors_come_back_as_they_were(kinds: list[tuple[str, tuple[int, ...]]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sent = {
        f"t{i}": (torch.randn(shape, generator=generator) * 9).to(DTYPES[dtype])
        for i, (dtype, shape) in enumerate(kinds)
    }
    got = decode(encode(HEAD, LETTER, sent), "svi").tensors()
    assert list(got) == list(sent)
    for name, tensor in sent.items():
        assert got[name].dtype is tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(got[name], tensor)


def test_views_are_sent_as_they_read_and_received_as_their_own() -> None:
    whole = torch.arange(12.0).view(3, 4)
    frame = encode(HEAD, LETTER, {"x": whole.T[1:3]})
    got = decode(frame, "svi").tensors()["x"]
    assert torch.equal(got, whole.T[1:3])
    got += 1
    assert torch.equal(decode(frame, "svi").tensors()["x"], whole.T[1:3])


def test_what_has_no_name_is_not_sent() -> None:
    with pytest.raises(PartwayError, match="complex64 cannot be sent"):
        encode(HEAD, LETTER, {"x": torch.zeros(2, dtype=torch.complex64)})


def test_frames_one_after_the_other() -> None:
    one = encode(HEAD, LETTER, {"x": torch.ones(3)})
    other = encode(HEAD, Bye())
    frames = split(one + other + one, "svi")
    assert [bytes(f.data) for f in frames] == [one, other, one]
    assert [type(f.message) for f in frames] == [Letter, Bye, Letter]
    assert torch.equal(frames[2].tensors()["x"], torch.ones(3))
    with pytest.raises(PeerError, match="2 frames where one was due"):
        decode(one + other, "svi")


# -- what is no frame

GOOD = encode(HEAD, LETTER, {"x": torch.ones(3)})


def with_header(header: object, payload: bytes = b"") -> bytes:
    text = msgspec.msgpack.encode(header)
    return PREFIX.pack(b"PWAY", 1, len(text), len(payload)) + text + bytes(-(24 + len(text)) % 64) + payload


def header_of(message: object, tensors: object = (), head: object = ("svi", "server", b"", 0)) -> object:
    return (head, message, tensors)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no frame"),
        (GOOD[:23], "no frame"),
        (b"GET / HTTP/1.1\r\nHost: partway\r\n", "not a Partway frame"),
        (GOOD[:4] + b"\x02" + GOOD[5:], "install the same version"),
        (GOOD[:-1], "damaged"),
        (GOOD + b"\x00", "no frame"),
        (PREFIX.pack(b"PWAY", 1, LARGEST_HEADER + 1, 0) + bytes(2 * LARGEST_HEADER), "damaged"),
        (PREFIX.pack(b"PWAY", 1, 8, 2**60) + bytes(99), "damaged"),
        (with_header("nonsense"), "cannot be read"),
        (with_header(header_of(["letter", 7])), "cannot be read"),
        (with_header(header_of(["bye", "more"])), "cannot be read"),
        (with_header(header_of(["execute", "rm"])), "cannot be read"),
        (with_header(header_of(["letter", -1, [1, ["a", ""], ["b", ""], 0]])), "cannot be read"),
        (with_header(header_of(["letter", 1, [99, ["a", ""], ["b", ""], 0]])), "cannot be read"),
        (with_header(header_of(["greet", "1" * 33])), "cannot be read"),
        (with_header(header_of(["bye"], head=("../x", "server", b"", 0))), "cannot be read"),
        (with_header(header_of(["bye"], head=("a" * 65, "server", b"", 0))), "cannot be read"),
        (with_header(header_of(["bye"], head=("svi", "server", bytes(33), 0))), "cannot be read"),
        (with_header(header_of(["bye"], [["x", "float99", [1]]]), bytes(4)), "wire format does not have"),
        (with_header(header_of(["bye"], [["x", "float32", [-1]]]), bytes(4)), "cannot be read"),
        (with_header(header_of(["bye"], [["x", "float32", [1] * 9]]), bytes(4)), "cannot be read"),
        (with_header(header_of(["bye"], [["x", "float32", [2]]]), bytes(4)), "do not fill"),
        (with_header(header_of(["bye"], [["x", "uint8", [2**39, 2**39, 2**39]]])), "do not fill"),
        (with_header(header_of(["bye"], [["x", "uint8", [1]]] * 4097), bytes(4)), "cannot be read"),
    ],
)
def test_what_is_no_frame(data: bytes, words: str) -> None:
    with pytest.raises(PeerError, match=words) as caught:
        split(data, "svi")
    assert caught.value.peer == "svi"


@given(st.data())
def test_a_damaged_frame_is_refused_or_differs_from_the_good_one(data: st.DataObject) -> None:
    """No damage of the prefix or the header raises anything but `PeerError`."""
    damaged = bytearray(GOOD)
    at = data.draw(st.integers(0, 127))
    damaged[at] ^= data.draw(st.integers(1, 255))
    try:
        frame = decode(bytes(damaged), "svi")
        frame.tensors()
    except PeerError:
        return
    good = decode(GOOD, "svi")
    padded = struct.unpack_from("<I", GOOD, 8)[0] + 24
    assert frame[:3] != good[:3] or 5 <= at < 8 or 12 <= at < 16 or at >= padded


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=5))
def test_size_can_be_told_from_the_names_alone(kinds: list[tuple[str, tuple[int, ...]]]) -> None:
    specs, pieces = wire_tensors.pack({f"t{i}": torch.zeros(s).to(DTYPES[d]) for i, (d, s) in enumerate(kinds)})
    assert sum(len(p) for p in pieces) == wire_tensors.payload_size(specs)
    assert [s.nbytes for s in specs] == [math.prod(s.shape) * np.dtype(sized(s.dtype)).itemsize for s in specs]


def sized(dtype: str) -> str:
    return "float16" if dtype == "bfloat16" else dtype
