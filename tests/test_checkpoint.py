"""Checkpoints: what is whole is found, what is not is passed over, and nothing that was saved runs."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.run import checkpoint
from training.run.checkpoint import CheckpointError

ROOT = Path(__file__).parents[1]
FILES = (checkpoint.WEIGHTS, checkpoint.AVERAGE, checkpoint.OPTIMIZER, checkpoint.MANIFEST)


def state(step):
    """A small network's weights, their average and its optimizer after two steps, other ones for each step."""
    torch.manual_seed(step)
    model = torch.nn.Conv2d(2, 3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        model(torch.randn(1, 2, 4, 4)).square().sum().backward()
        optimizer.step()
    ema = {name: 2 * tensor.detach() for name, tensor in model.named_parameters()}
    return {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}


def save(folder, step, total_limit=2):
    return checkpoint.save(folder, step, **state(step), facts={"global_batch": 4, "x": [1]}, total_limit=total_limit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path):
    path = save(tmp_path / "new" / "run", 500)
    assert path.name == "checkpoint-000500"
    assert names(path) == sorted(FILES)
    found, manifest = checkpoint.find(tmp_path / "new" / "run", "latest")
    assert found == path
    assert {name: manifest[name] for name in ("step", "global_batch", "x")} == {
        "step": 500,
        "global_batch": 4,
        "x": [1],
    }
    expected = state(500)
    model, ema, optimizer = checkpoint.load(path)
    for loaded, saved in ((model, expected["model"]), (ema, expected["ema"])):
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) and loaded[name].dtype == torch.float32 for name in saved)
    assert optimizer["param_groups"] == expected["optimizer"]["param_groups"]
    for number, moments in expected["optimizer"]["state"].items():
        assert all(torch.equal(optimizer["state"][number][name], moment) for name, moment in moments.items())


def test_tensors_that_lie_in_one_memory_or_out_of_order_are_saved(tmp_path):
    flat = torch.arange(24.0)
    views = {"a": flat[:12].view(3, 4), "b": flat[12:].view(3, 4).t()}
    checkpoint.save(tmp_path, 1, model=views, ema={"a": flat[:2].clone()}, optimizer={}, facts={}, total_limit=1)
    model, _, _ = checkpoint.load(tmp_path / "checkpoint-000001")
    assert all(torch.equal(model[name], views[name]) for name in views)


# ---- Damage ----------------------------------------------------------------------------------------------------------


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def turn_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


def make_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in (empty, zeros, remove, make_folder)]
    + [(name, damage) for name in FILES[:3] for damage in (cut, turn_a_bit)],  # of the manifest: see the next test
)
def test_a_damaged_file_is_found_and_latest_goes_back_to_the_one_before(tmp_path, name, damage):
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    damage(newest / name)
    with pytest.raises(CheckpointError, match=str(newest)):
        checkpoint.find(tmp_path, str(newest))
    lines = []
    assert checkpoint.find(tmp_path, "latest", lines.append)[0] == before
    assert len(lines) == 1 and "checkpoint-000002 is passed over" in lines[0] and str(newest / name) in lines[0]
    damage(before / name)
    with pytest.raises(CheckpointError, match=f"{newest}.*; .*{before}"):  # says what is wrong with each
        checkpoint.find(tmp_path, "latest")


def test_a_manifest_with_any_key_or_sum_changed_is_no_crash(tmp_path):
    path = save(tmp_path, 3)
    content = (path / checkpoint.MANIFEST).read_bytes()
    for place in range(content.index(b'"files"'), len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        (path / checkpoint.MANIFEST).write_bytes(changed)
        try:
            assert checkpoint.verified(path)["step"] == 3  # only white space was hit
            assert content[place : place + 1].isspace()
        except CheckpointError:
            pass
    for other in ("[]", "3", "null", '"files"', '{"files": 1}', '{"files": {"model.safetensors": [1]}}', "{"):
        (path / checkpoint.MANIFEST).write_text(other)
        with pytest.raises(CheckpointError, match="checkpoint-000003"):
            checkpoint.verified(path)


# ---- Names -----------------------------------------------------------------------------------------------------------


def test_stray_names_are_neither_found_nor_deleted(tmp_path):
    whole = save(tmp_path, 7, total_limit=1)
    strays = ["checkpoint-000900.tmp", "checkpoint-500-bak", "checkpoint-000800-bak", "checkpoint-900", "checkpoint-"]
    for stray in (*strays, "checkpoint-0009x0", "my-checkpoint-000900"):
        shutil.copytree(whole, tmp_path / stray)
    (tmp_path / "checkpoint-000950").write_text("a file")
    everything = names(tmp_path)
    assert checkpoint.find(tmp_path, "latest")[0] == whole
    assert save(tmp_path, 8, total_limit=1).name == "checkpoint-000008"
    assert set(everything) - set(names(tmp_path)) == {"checkpoint-000007"}


def test_a_folder_left_over_from_an_interrupted_save_is_replaced(tmp_path):
    for name in ("checkpoint-000005.tmp", "checkpoint-000005.tmp-123", f"checkpoint-000005.tmp-{os.getpid()}"):
        half = tmp_path / name
        half.mkdir()
        (half / "model.safetensors").write_text("half")
        (half / "more").write_text("more")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find(tmp_path, "latest")
    path = save(tmp_path, 5)  # the process number may come again
    checkpoint.clear(tmp_path)
    assert names(tmp_path) == ["checkpoint-000005"]
    assert names(path) == sorted(FILES)
    checkpoint.verified(path)


def test_a_whole_one_that_was_to_be_replaced_is_put_back(tmp_path):
    path = save(tmp_path, 5)
    path.rename(tmp_path / "checkpoint-000005.old")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find(tmp_path, "latest")
    checkpoint.clear(tmp_path)
    assert checkpoint.find(tmp_path, "latest")[0] == path
    shutil.copytree(path, tmp_path / "checkpoint-000005.old")
    checkpoint.clear(tmp_path)
    assert names(tmp_path) == ["checkpoint-000005"]


def test_clearing_leaves_what_is_not_ours(tmp_path):
    kept = ["checkpoint-5.tmp", "checkpoint-000005.tmp-x", "checkpoint-000005.bak", "my-checkpoint-000005.tmp"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-000005.tmp").write_text("a file")
    checkpoint.clear(tmp_path)
    assert names(tmp_path) == sorted([*kept, "checkpoint-000005.tmp"])


def test_latest_goes_by_number_not_by_name(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert checkpoint.find(tmp_path, "latest")[1]["step"] == 1_000_000


def test_an_explicit_folder_may_be_a_link_or_end_in_a_slash(tmp_path):
    first, _ = save(tmp_path, 1), save(tmp_path, 2)
    (tmp_path / "best").symlink_to(first)
    for which in (str(first) + "/", str(tmp_path / "best"), first.name):
        assert checkpoint.find(tmp_path, which)[1]["step"] == 1
    other = save(tmp_path / "other run", 3)
    backup = shutil.copytree(first, tmp_path / "checkpoint-000001-bak")
    for which in (tmp_path, tmp_path / "nothing", other, backup):
        with pytest.raises(CheckpointError, match=str(which)):
            checkpoint.find(tmp_path, str(which))


# ---- Rotation: the new one is whole before an old one goes -----------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, limit):
    for step in range(1, 6):
        new = save(tmp_path, step, limit)
        assert new.is_dir()
        assert names(tmp_path) == [f"checkpoint-{n:06d}" for n in range(max(1, step - limit + 1), step + 1)]
        for path in tmp_path.iterdir():
            checkpoint.verified(path)


@pytest.mark.parametrize("limit", [1, 2])
def test_later_checkpoints_of_a_run_that_is_replaced_go(tmp_path, limit):
    for step in (10, 20):
        save(tmp_path, step, 2)
    new = save(tmp_path, 15, limit)
    assert checkpoint.find(tmp_path, "latest")[0] == new
    assert names(tmp_path) == ["checkpoint-000010", "checkpoint-000015"][-limit:]
    again = save(tmp_path, 15, limit)
    assert again == new
    checkpoint.verified(again)


@pytest.mark.parametrize("fails", ["safetensors_bytes", "torch.save", "_to_disk", "json.dumps", "os.fsync"])
def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_half_one(tmp_path, monkeypatch, fails):
    old = save(tmp_path, 1, total_limit=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    owner = {"torch.save": torch, "json.dumps": json, "os.fsync": os}.get(fails, checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(owner, fails.split(".")[-1], full)
        with pytest.raises(checkpoint.NoRoomError, match=f"{tmp_path}/checkpoint-000002.*No space.* bytes, .* free"):
            save(tmp_path, 2, total_limit=1)
    assert checkpoint.find(tmp_path, "latest")[0] == old
    assert names(tmp_path) == ["checkpoint-000001"]
    save(tmp_path, 2, total_limit=1)
    assert names(tmp_path) == ["checkpoint-000002"]


def test_everything_is_on_the_disk_before_it_has_its_name_and_before_the_old_one_goes(tmp_path, monkeypatch):
    save(tmp_path, 1, total_limit=1)
    events = []
    fsync, replace, rmtree = os.fsync, os.rename, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(checkpoint.Path, "replace", lambda a, b: (events.append(f"named {b.name}"), replace(a, b)))
    verified = checkpoint.verified
    monkeypatch.setattr(checkpoint, "verified", lambda path: (events.append("read"), verified(path)))
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **options: (events.append(f"deleted {path.name}"), rmtree(path, **options))
    )
    save(tmp_path, 2, total_limit=1)
    temporary, gone = tmp_path / f"checkpoint-000002.tmp-{os.getpid()}", f"checkpoint-000001.tmp-{os.getpid()}"
    assert events[0] == f"deleted {temporary.name}"
    assert sorted(events[1:6]) == sorted(map(str, [temporary, *(temporary / name for name in FILES)]))
    assert events[6:] == ["named checkpoint-000002", str(tmp_path), "read", f"named {gone}", f"deleted {gone}"]


def test_what_cannot_be_deleted_is_warned_of_and_harms_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1, total_limit=1)

    def denied(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Denied")

    monkeypatch.setattr(shutil, "rmtree", denied)
    with pytest.warns(UserWarning, match="checkpoint-000001.* cannot be deleted: Denied"):
        new = save(tmp_path, 2, total_limit=1)
    assert checkpoint.find(tmp_path, "latest")[0] == new


def test_a_checkpoint_that_reads_back_otherwise_costs_no_older_one(tmp_path, monkeypatch):
    old, write = save(tmp_path, 1, total_limit=1), checkpoint._write

    def bad_disk(path, content):
        entry = write(path, content)
        turn_a_bit(path)
        return entry

    monkeypatch.setattr(checkpoint, "_write", bad_disk)
    with pytest.raises(CheckpointError, match="checkpoint-000002"):
        save(tmp_path, 2, total_limit=1)
    assert checkpoint.find(tmp_path, "latest")[0] == old


# ---- Lock and room ---------------------------------------------------------------------------------------------------


def test_a_folder_is_locked_against_another_process_until_its_holder_ends(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom training import checkpoint\n"
    code += f"file = checkpoint.lock(Path({str(tmp_path / 'run')!r}))\nprint('locked', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(CheckpointError, match=f"another run is writing.*process {holder.pid} on"):
            checkpoint.lock(tmp_path / "run")
        holder.kill()
        holder.wait()
    checkpoint.lock(tmp_path / "run").close()
    assert f"process {os.getpid()}" in (tmp_path / "run" / ".lock").read_text()


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/run"):
        with pytest.raises(CheckpointError, match=f"output_dir is '{tmp_path / name}'"):
            checkpoint.lock(tmp_path / name)


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    old = save(tmp_path, 1, total_limit=1)
    free = 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    monkeypatch.setattr(checkpoint, "_write", lambda *_: pytest.fail("written"))
    with pytest.raises(checkpoint.NoRoomError, match=r"needs [\d,]+ bytes, (and )?1,000 are free"):
        save(tmp_path, 2, total_limit=1)
    assert checkpoint.find(tmp_path, "latest")[0] == old


def test_the_bytes_foreseen_are_about_those_written(tmp_path):
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.AdamW(model.parameters())
    before = checkpoint.bytes_of(model.state_dict(), model.state_dict())
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    states = {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": optimizer.state_dict()}
    path = checkpoint.save(tmp_path, 1, **states, facts={}, total_limit=1)
    written = sum(file.stat().st_size for file in path.iterdir())
    for foreseen in (before, checkpoint.bytes_of(**states)):
        assert written <= foreseen <= 1.1 * written


# ---- Pickles ---------------------------------------------------------------------------------------------------------


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    optimizer = {"state": {}, "param_groups": [Canary(canary)]}
    path = checkpoint.save(tmp_path, 1, model={}, ema={}, optimizer=optimizer, facts={}, total_limit=1)
    checkpoint.find(tmp_path, "latest")  # its sums are right
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        checkpoint.load(path)
    (path / checkpoint.OPTIMIZER).write_bytes(pickle.dumps(Canary(canary), protocol=2))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        checkpoint.load(path)
    assert not canary.exists()
