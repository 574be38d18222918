"""What people write in TOML, as frozen settings with a line and a unit a field. The only reader of TOML.

>>> job = read_job('''
... [job]
... name = "study"
... [network]
... build = "partway.model.zoo:mlp"
... arguments = { inputs = 4, hidden = [8], classes = 2 }
... cut = ["hidden.0"]
... [training]
... epochs = 2
... ''')
>>> job.training.batch
256
>>> read_job('[job]\\nname = "study"\\nsed = 1')
Traceback (most recent call last):
    ...
partway.errors.ConfigError: the job: [job] has no key `sed`; did you mean `seed`?
"""

from __future__ import annotations

from partway.config.job import (
    LANED,
    MOST_MICRO_BATCHES,
    Averaged,
    Configuration,
    Evaluation,
    HalfTrained,
    Held,
    Job,
    JobHeader,
    JobNetwork,
    JobRecords,
    LocalOptimizer,
    Optimizer,
    OwnPlan,
    PlanEdge,
    PlanSegment,
    Predict,
    Private,
    RateSchedule,
    Relay,
    ResultTerms,
    ScheduleName,
    SegmentNetwork,
    SemiSupervised,
    Training,
    job_texts,
    read_job,
    read_job_file,
)
from partway.config.process import (
    Connection,
    Policy,
    Server,
    ServerHeader,
    Site,
    SiteHeader,
    of_any_size,
    read_server,
    read_site,
)
from partway.config.schema import (
    SCHEMAS,
    BinaryTarget,
    Category,
    ClassesTarget,
    Column,
    Columns,
    Flag,
    Image,
    MultiLabelTarget,
    Numeric,
    RegressionTarget,
    Scale,
    SchemaHeader,
    Side,
    SurvivalTarget,
    TargetSettings,
    bundled_schema,
    made_of,
    read_schema,
)
from partway.config.words import Count, Fingerprint, Name, Positive, Rate, Settings, contents, said

__all__ = [
    "LANED",
    "MOST_MICRO_BATCHES",
    "SCHEMAS",
    "Averaged",
    "BinaryTarget",
    "Category",
    "ClassesTarget",
    "Column",
    "Columns",
    "Configuration",
    "Connection",
    "Count",
    "Evaluation",
    "Fingerprint",
    "Flag",
    "HalfTrained",
    "Held",
    "Image",
    "Job",
    "JobHeader",
    "JobNetwork",
    "JobRecords",
    "LocalOptimizer",
    "MultiLabelTarget",
    "Name",
    "Numeric",
    "Optimizer",
    "OwnPlan",
    "PlanEdge",
    "PlanSegment",
    "Policy",
    "Positive",
    "Predict",
    "Private",
    "Rate",
    "RateSchedule",
    "RegressionTarget",
    "Relay",
    "ResultTerms",
    "Scale",
    "ScheduleName",
    "SchemaHeader",
    "SegmentNetwork",
    "SemiSupervised",
    "Server",
    "ServerHeader",
    "Settings",
    "Side",
    "Site",
    "SiteHeader",
    "SurvivalTarget",
    "TargetSettings",
    "Training",
    "bundled_schema",
    "contents",
    "job_texts",
    "made_of",
    "of_any_size",
    "read_job",
    "read_job_file",
    "read_schema",
    "read_server",
    "read_site",
    "said",
]
