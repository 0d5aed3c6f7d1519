"""What a checkpoint holds of a training: that a run resumes from it."""

import itertools
import os
import signal

import pytest
from training_runs import contrastive, trainer_of

from experiments.clip.errors import Interrupted
from experiments.clip.signals import asked, handled
from experiments.clip.training.checkpoint import latest_checkpoint


def test_a_validation_that_was_interrupted_is_made_up_for(pairs, tmp_path):
    """Its record is that of a run that was not: it holds what was measured in the step before."""
    scores = {"accuracy": 0.5}

    def interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        return scores

    whole = trainer_of(pairs, contrastive(), tmp_path / "whole" / "c", validate=lambda: scores).fit()
    with handled("again"), pytest.raises(Interrupted, match="after step 5 of 10"):
        trainer_of(pairs, contrastive(), tmp_path / "c", validate=interrupted, stop=asked).fit()
    assert latest_checkpoint(tmp_path / "c").name == "step-00000005"
    calls = itertools.count()
    again = trainer_of(pairs, contrastive(), tmp_path / "c", validate=lambda: scores | {"calls": next(calls)}).fit()
    assert [record.pop("calls") for record in again] == [0, 1]
    assert again == whole and [record["step"] for record in again] == [5, 10]
    finished = trainer_of(pairs, contrastive(), tmp_path / "c", validate=lambda: scores | {"calls": next(calls)})
    assert [record["step"] for record in finished.fit()] == [5, 10] and next(calls) == 2


def test_counts_of_a_batch_that_was_given_and_not_used_are_not_kept(pairs, tmp_path):
    """The signal comes while the fourth batch is waited for, after the stream has counted it."""

    def counting(stream, at):
        batches = stream.batches
        seen = iter(range(1, 100))

        def counted(epoch, first):
            for batch in batches(epoch, first):
                stream.seen = next(seen)
                if stream.seen == at:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        stream.batches, stream.state_dict = counted, lambda: {"seen": stream.seen}

    trainer = trainer_of(pairs, contrastive(), tmp_path / "c", stop=asked)
    counting(trainer.state.stream, 4)
    with handled("again"), pytest.raises(Interrupted, match="after step 3 of 10"):
        trainer.fit()
    assert trainer.state.counts == {"seen": 3}
