"""Every test here loads trackers as a run does."""

from tests.support.tracking import tracker_environment

__all__ = ["tracker_environment"]
