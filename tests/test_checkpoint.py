import warnings

import pytest
import torch
from torch import nn

from syncmask.training import checkpoint as checkpoint_module
from syncmask.training.checkpoint import load_checkpoint, newest_complete, save_checkpoint
from syncmask.training.optim import make_optimizer, make_schedule


def save(folder, step, **settings):
    tensors = {"model": {"weight": torch.full((3,), float(step))}, "feature_bank": {"seen": torch.tensor([True])}}
    return save_checkpoint(folder, tensors, {"step": step, "epoch": 1}, **settings)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def train(model, optimizer, schedule, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=generator)).square().mean().backward()
        optimizer.step()
        schedule.step()


def small_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    optimizer = make_optimizer(model, 0.01, 0.1)
    return model, optimizer, make_schedule(optimizer, 2, 20)


def test_everything_comes_back_equal(tmp_path):
    tensors = {
        "model": {"a": torch.randn(2, 3), "half": torch.ones(2, dtype=torch.bfloat16), "scalar": torch.tensor(3)},
        "bank": {"seen": torch.tensor([True, False]), "order": torch.arange(5)},
    }
    state = {"step": 7, "epoch": 2, "tau": 0.1 + 0.2, "gate": None, "history": [1.5, "x"], "open": True}
    loaded = load_checkpoint(save_checkpoint(tmp_path, tensors, state))
    assert loaded.state == state and loaded.optimizer_state is None
    for stem, named in tensors.items():
        for name, tensor in named.items():
            assert torch.equal(loaded.tensors[stem][name], tensor)
            assert loaded.tensors[stem][name].dtype == tensor.dtype
    assert names(tmp_path) == ["step_00000007"]


def test_tied_and_strided_tensors_are_saved(tmp_path):
    shared = torch.randn(4, 3)
    named = {"in": shared, "out": shared, "turned": shared.T, "part": shared[1:]}
    loaded = load_checkpoint(save_checkpoint(tmp_path, {"model": named}, {"step": 1})).tensors["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in named.items())


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    model, optimizer, schedule = small_training()
    train(model, optimizer, schedule, 5, seed=1)
    state = {"step": 5, "schedule": schedule.state_dict()}
    path = save_checkpoint(tmp_path, {"model": model.state_dict()}, state, optimizer.state_dict())
    train(model, optimizer, schedule, 5, seed=2)

    other, other_optimizer, other_schedule = small_training()
    loaded = load_checkpoint(path)
    other.load_state_dict(loaded.tensors["model"])
    other_optimizer.load_state_dict(loaded.optimizer_state)
    other_schedule.load_state_dict(loaded.state["schedule"])
    train(other, other_optimizer, other_schedule, 5, seed=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert other_schedule.get_last_lr() == schedule.get_last_lr()


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep_last=2, best=10)
    assert names(tmp_path) == ["step_00000010", "step_00000030", "step_00000040"]
    save(tmp_path, 50, keep_last=1, best=40)
    assert names(tmp_path) == ["step_00000040", "step_00000050"]
    assert newest_complete(tmp_path).name == "step_00000050"


def test_what_was_just_saved_is_never_pruned(tmp_path):
    """A run that went back to an older checkpoint saves steps below those that lie there."""
    save(tmp_path, 90, keep_last=1)
    assert save(tmp_path, 10, keep_last=1).is_dir()


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert newest_complete(tmp_path).name == "step_100000000"


@pytest.mark.parametrize("harm", ["changed", "short", "missing", "no COMPLETE", "empty COMPLETE"])
def test_a_harmed_checkpoint_is_named_skipped_and_left_in_place(tmp_path, harm):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    weights = bad / "model.safetensors"
    if harm == "changed":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif harm == "short":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif harm == "missing":
        weights.unlink()
    elif harm == "no COMPLETE":
        (bad / "COMPLETE").unlink()
    else:
        (bad / "COMPLETE").write_text("")
    before = names(bad)
    with pytest.warns(UserWarning, match="step_00000002 is skipped and left in place"):
        assert newest_complete(tmp_path) == good
    assert names(bad) == before
    with pytest.raises(ValueError, match="cannot be used"):
        load_checkpoint(bad)
    save(tmp_path, 3, keep_last=1)
    assert names(tmp_path) == (["step_00000002", "step_00000003"] if "no COMPLETE" == harm else ["step_00000003"])


def test_no_checkpoint_at_all(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_complete(tmp_path / "absent") is None
        (tmp_path / "step_00000005.unfinished").mkdir()
        (tmp_path / "notes").mkdir()
        (tmp_path / "step_00000009").write_text("a file")
        assert newest_complete(tmp_path) is None


def test_all_is_on_the_disk_before_the_name_is_given(tmp_path, monkeypatch):
    flush, put_in_place, events = checkpoint_module.flush, checkpoint_module.put_in_place, []
    monkeypatch.setattr(checkpoint_module, "flush", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(
        checkpoint_module, "put_in_place", lambda *paths: (events.append("named"), put_in_place(*paths))
    )
    save(tmp_path, 1)
    tensors = ["feature_bank.safetensors", "model.safetensors"]
    assert sorted(events[:2]) == tensors  # in threads, so in any order
    assert events[2:] == ["state.json", "COMPLETE", "step_00000001.unfinished", "named", tmp_path.name]


@pytest.mark.parametrize("function", ["save_file", "flush", "sha256", "put_in_place"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, function):
    before = save(tmp_path, 1, keep_last=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, function, full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["step_00000001"]
    assert newest_complete(tmp_path) == before
    assert save(tmp_path, 2, keep_last=1).is_dir()


def test_a_killed_write_counts_for_nothing_and_is_cleared_away(tmp_path, monkeypatch):
    """A kill runs no clean-up: whatever was written stays under its temporary name."""
    before = save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(checkpoint_module, "put_in_place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_00000001", "step_00000002.unfinished"]
    assert newest_complete(tmp_path) == before
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_a_whole_checkpoint_is_never_written_again(tmp_path):
    """Replacing it would open a moment in which a kill leaves neither."""
    save(tmp_path, 5)
    save_checkpoint(tmp_path, {"model": {"weight": torch.zeros(1)}}, {"step": 5, "epoch": 9})
    assert load_checkpoint(tmp_path / "step_00000005").state["epoch"] == 1
    assert names(tmp_path) == ["step_00000005"]


def test_saving_over_a_broken_checkpoint_sets_it_aside(tmp_path):
    (save(tmp_path, 5) / "state.json").write_text("{}")
    save(tmp_path, 5)
    assert names(tmp_path) == ["step_00000005", "step_00000005.broken"]
    assert newest_complete(tmp_path).name == "step_00000005"


def test_an_optimizer_of_tensors_and_numbers_comes_back_equal(tmp_path):
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 7: {"step": 4, "none": None}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": [0.9, 0.999], "params": [0, 7], "fused": True, "foreach": None}],
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, {}, {"step": 1}, state)).optimizer_state
    assert loaded["param_groups"] == state["param_groups"] and loaded["state"][7] == state["state"][7]
    assert all(torch.equal(loaded["state"][0][name], tensor) for name, tensor in state["state"][0].items())


def test_nothing_in_a_checkpoint_can_hold_code(tmp_path):
    model, optimizer, schedule = small_training()
    train(model, optimizer, schedule, 1, seed=1)
    path = save_checkpoint(tmp_path, {"model": model.state_dict()}, {"step": 1}, optimizer.state_dict())
    kinds = {file.name if file.suffix != ".safetensors" else file.suffix for file in path.iterdir()}
    assert kinds == {".safetensors", "state.json", "COMPLETE"}


def test_too_little_room_is_told_in_bytes_before_anything_is_written(tmp_path, monkeypatch):
    before = save(tmp_path, 1)
    usage = checkpoint_module.shutil.disk_usage(tmp_path)._replace(free=5)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"step_00000002 could not be written; it needs 13 bytes and 5 are free"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001"] and newest_complete(tmp_path) == before


def test_requests_are_checked_before_anything_is_written(tmp_path):
    for arguments, said in (
        (({}, {}), "number of steps"),
        (({"../model": {}}, {"step": 1}), "no file stem"),
        (({}, {"step": 1}, None, 0), "keep_last is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            save_checkpoint(tmp_path / "checkpoints", *arguments)
    assert not (tmp_path / "checkpoints").exists()
