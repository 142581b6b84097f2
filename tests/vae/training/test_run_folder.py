"""Logs: one row per epoch, whatever a killed run has written before."""

import csv

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pyro_flowguides.vae.training.run_folder import EpochLog


def row(epoch, elbo):
    return {"epoch": float(epoch), "step": 10.0 * epoch, "valid_elbo": elbo}


def logged(folder):
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_every_row_is_in_the_file_at_once(tmp_path):
    log = EpochLog(tmp_path, [], tensorboard=False)
    for epoch in (1, 2):
        log.add(row(epoch, -1.5 * epoch))
        assert logged(tmp_path) == [row(e, -1.5 * e) for e in range(1, epoch + 1)]


def test_epochs_after_the_last_checkpoint_are_replaced(tmp_path):
    (tmp_path / "last.pt").write_text("checkpoint")
    killed = EpochLog(tmp_path, [])
    for epoch in (1, 2, 3):
        killed.add(row(epoch, -float(epoch)))
    killed.close()
    resumed = EpochLog(tmp_path, [row(1, -1.0), row(2, -2.0)])
    resumed.add(row(3, -30.0))
    resumed.close()
    assert logged(tmp_path) == [row(1, -1.0), row(2, -2.0), row(3, -30.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("valid/elbo")
    assert [(event.step, event.value) for event in events] == [(1, -1), (2, -2), (3, -30)]
    assert (tmp_path / "last.pt").read_text() == "checkpoint"
