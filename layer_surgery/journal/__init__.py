"""What a run has finished, on disk, so that the same run goes on from there after it was killed."""

from layer_surgery.journal.run import NOTHING_KEPT, Journal, check_journal, open_journal
from layer_surgery.journal.steps import NO_STEPS, Finished, Steps

__all__ = ["NOTHING_KEPT", "NO_STEPS", "Finished", "Journal", "Steps", "check_journal", "open_journal"]
