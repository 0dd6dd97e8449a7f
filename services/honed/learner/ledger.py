"""The journal's records under their old names, for callers that still read the learner's files."""

from honed.learner.journal import PushRecord, read_pushes
from honed.learner.journal import UpdateRecord as StepRecord
from honed.learner.journal import read_updates as read_steps

__all__ = ["PushRecord", "StepRecord", "read_pushes", "read_steps"]
