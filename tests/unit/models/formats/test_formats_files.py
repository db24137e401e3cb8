"""Where checkpoints lie, files that are damaged or malicious, and the commands."""

from __future__ import annotations

import io
import json
import os
import pickle
import socketserver
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from formats_models import CLIP_VIT, IGPT, VIT, assert_same, assert_same_state, make
from safetensors.torch import load_file, save_file

from pipeline.core.errors import CheckpointError, ConfigError, StorageError
from pipeline.core.storage import Storage
from pipeline.models.formats import export, load, read
from pipeline.models.formats.__main__ import main
from pipeline.models.formats.torchscript import read_torchscript


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A small ViT as a Hugging Face directory."""
    export(make("vit", VIT), str(tmp_path / "vit"), "hf")
    return tmp_path / "vit"


# Malice


class Harm:
    """What a pickle may be made to do by whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "model.ckpt", "model.pth.tar", "noname"])
@pytest.mark.parametrize("how", ["zip", "legacy", "raw"])
def test_no_pickle_is_executed(name: str, how: str, tmp_path: Path) -> None:
    content = {"state_dict": {"a": torch.ones(2)}, "extra": Harm(tmp_path / "harmed")}
    if how == "raw":
        (tmp_path / name).write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError) as refused:
        read(str(tmp_path / name))
    assert str(refused.value).startswith(f"{tmp_path}/{name}: ") and "\n" not in str(refused.value)
    assert not (tmp_path / "harmed").exists()
    if how == "zip":
        assert "for it may run code" in str(refused.value)
        torch.load(tmp_path / name, weights_only=False)  # what would have happened
        assert (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "harm", [b"cposix\nmkdir\n(X\x05\x00\x00\x00/tmp/\x85R.", pickle.dumps(Harm(Path("/nowhere"))), b"I1\n.", b"\x80\x02]q\x00h\x05."]
)
def test_no_torchscript_is_executed(harm: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.pt", "w") as archive:
        archive.writestr("some/data.pkl", harm)
        archive.writestr("some/constants.pkl", pickle.dumps(()))
        archive.writestr("some/version", "3")
    with pytest.raises(CheckpointError, match="is damaged, or holds more than modules and tensors") as refused:
        read(str(tmp_path / "some.pt"))
    assert str(refused.value).startswith(f"{tmp_path}/some.pt: ")


def test_torchscript_archives_are_read_as_torch_does(tmp_path: Path) -> None:
    """Shared, transposed and offset tensors, attributes of other kinds, several modules of one class."""
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 4).half(), torch.nn.BatchNorm1d(4), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    )
    whole = torch.arange(24.0)
    module.register_buffer("transposed", whole.view(4, 6).t())
    module.register_buffer("part", whole[5:11])
    module.register_buffer("counts", torch.arange(5))
    torch.jit.script(module).save(str(tmp_path / "some.pt"))
    assert_same_state(read_torchscript(tmp_path / "some.pt", "some.pt"), dict(torch.jit.load(str(tmp_path / "some.pt")).state_dict()))


# Damage


@pytest.mark.parametrize("name", ["model.safetensors", "some.npz", "some.pt", "config.json"])
def test_damage_is_said_in_a_sentence(name: str, out: Path) -> None:
    if name == "some.npz":
        np.savez(out / name, a=np.ones(300))
    elif name == "some.pt":
        torch.save({"a": torch.ones(300)}, out / name)
    whole = (out / name).read_bytes()
    url = str(out) if name == "config.json" else str(out / name)
    for size in (0, 1, len(whole) // 3, len(whole) - 9):
        (out / name).write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as refused:
            read(url)
        assert str(refused.value).startswith(f"{url}: ") and "\n" not in str(refused.value)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for name, content in {"text.pt": b"hello", "picture.safetensors": b"\x89PNG\r\n", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="there is no such file or directory"):
        read(str(tmp_path / "nothing"))
    (tmp_path / "directory").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint; known are Hugging Face"):
        read(str(tmp_path / "directory"))
    for name in ("a.pth", "b.pth"):
        torch.save({"x": torch.ones(2)}, tmp_path / "directory" / name)
    with pytest.raises(CheckpointError, match="holds 2 files of weights, name one"):
        read(str(tmp_path / "directory"))
    with pytest.raises(CheckpointError, match=r"is none of the known formats \(Hugging Face .* its first tensors are x"):
        read(str(tmp_path / "directory" / "a.pth"))
    torch.save({"epoch": 3}, tmp_path / "directory" / "a.pth")
    with pytest.raises(CheckpointError, match="holds no state dict of tensors"):
        read(str(tmp_path / "directory" / "a.pth"))


def test_hugging_face_weights_need_their_config(out: Path) -> None:
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has the names of a Hugging Face model, but no config.json of it lies beside it"):
        read(str(out))


def test_everything_that_does_not_fit_is_named(out: Path) -> None:
    """A handful of names of each kind, the rest counted; both shapes; nothing is loaded."""
    state = load_file(out / "model.safetensors")
    for name in [n for n in state if n.startswith("vit.encoder.layer.1.")]:
        state[name.replace("layer.1.", "layer.7.")] = state.pop(name)
    state["classifier.weight"] = torch.zeros(5, 31)
    state["vit.embeddings.cls_token"] = torch.zeros(1, 32)
    state["vit.embeddings.position_ids"] = torch.zeros(1)  # no weight, of older versions
    save_file(state, out / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        read(str(out))
    layer = "vit.encoder.layer.1"
    assert str(refused.value).startswith(
        f"{out}: does not fit the model, missing: {layer}.layernorm_before.weight, {layer}.layernorm_before.bias, "
    )
    assert "and 11 more; unknown: vit.encoder.layer.7." in str(refused.value)
    assert "vit.embeddings.cls_token (1, 32) instead of (1, 1, 32)" in str(refused.value)
    assert "classifier.weight (5, 31) instead of (5, 32)" in str(refused.value) and "position_ids" not in str(refused.value)


def test_shards_that_are_missing(out: Path) -> None:
    (out / "model.safetensors").unlink()
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names model-1.safetensors, which is not there"):
        read(str(out))


def test_a_run_is_exported_by_its_own_command(store: Storage) -> None:
    store.write("run.yaml", b"")
    with pytest.raises(CheckpointError, match=rf"{store.url}: is a run; `python -m pipeline.checkpoint export` writes its model"):
        read(store.url, endpoint=store.endpoint)


def test_options_are_the_familys(out: Path) -> None:
    with pytest.raises(ConfigError, match=r"dropuot: no such key, did you mean 'dropout'"):
        read(str(out), dropuot=0.1)
    assert read(str(out), dropout=0.1).options["dropout"] == 0.1


# Places


def test_object_stores(s3: tuple[str, Callable[[], str]], tmp_path: Path) -> None:
    endpoint, make_bucket = s3
    bucket = make_bucket()
    model = make("vit", VIT)
    export(model, f"{bucket}/some/vit", "hf", endpoint=endpoint)
    for url in (f"{bucket}/some/vit", f"{bucket}/some/vit/", f"{bucket}/some/vit/model.safetensors"):
        assert_same(read(url, endpoint=endpoint), model)
    with pytest.raises(StorageError, match=r"is not empty, it holds config.json, model.safetensors; choose another place or give --force"):
        export(model, f"{bucket}/some/vit", "hf", endpoint=endpoint)
    for url in (f"{bucket}/nothing", f"{bucket}/nothing.pt"):
        with pytest.raises(CheckpointError, match=f"{url}: there is no such file or directory"):
            read(url, endpoint=endpoint)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        read(f"{bucket}/some", endpoint=endpoint)

    # A TensorFlow checkpoint is several files, named by what they have in common.
    from test_formats_igpt import openai, write_checkpoint

    igpt = make("igpt", IGPT)
    write_checkpoint(tmp_path / "model.ckpt-1", openai(dict(igpt.state_dict()), heads=2, depth=2), shards=2)
    for path in tmp_path.glob("model.ckpt-1*"):
        Storage(f"{bucket}/igpt", endpoint).put(path, path.name)
    for url in (f"{bucket}/igpt/model.ckpt-1", f"{bucket}/igpt/model.ckpt-1.index", f"{bucket}/igpt"):
        assert_same(read(url, endpoint=endpoint), igpt)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """An http server of `tmp_path`, without listings."""

    class Handler(SimpleHTTPRequestHandler):
        def list_directory(self, path: object) -> io.BytesIO | None:
            self.send_error(404)
            return None

        def log_message(self, *arguments: object) -> None:
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_web(web: str, out: Path) -> None:
    """A directory that cannot be listed is tried by the usual names; a file is a file."""
    expected = read(str(out))
    torch.save(expected.state, out.parent / "some.pth")
    for url in (f"{web}/vit", f"{web}/vit/model.safetensors"):
        assert read(url).options == expected.options
    assert_same_state(read(f"{web}/some.pth", heads=2).state, expected.state)
    with pytest.raises(CheckpointError, match="there is no such file or directory"):
        read(f"{web}/nothing.pth")


# Commands


def test_convert(out: Path, tmp_path: Path) -> None:
    """Through timm's format and back, to the same bytes."""
    runner, there, back = CliRunner(), str(tmp_path / "timm"), str(tmp_path / "back")
    done = runner.invoke(main, ["convert", str(out), there, "--to", "timm"])
    assert done.exit_code == 0 and done.output == f"{there}: vit from Hugging Face vit, as timm\n"
    assert runner.invoke(main, ["convert", there, back, "--to", "hf"]).exit_code == 0
    assert_same_state(load_file(f"{back}/model.safetensors"), load_file(out / "model.safetensors"))
    assert read(back).options == read(str(out)).options

    refused = runner.invoke(main, ["convert", there, back, "--to", "hf"])
    assert refused.exit_code == 3 and refused.stderr.startswith(f"error: {back}: is not empty")
    (tmp_path / "back" / "notes.txt").write_text("mine")
    assert runner.invoke(main, ["convert", there, back, "--to", "hf", "--force"]).exit_code == 0
    assert (tmp_path / "back" / "notes.txt").read_text() == "mine"
    refused = runner.invoke(main, ["convert", str(out), str(tmp_path / "clip"), "--to", "open_clip"])
    assert refused.exit_code == 3 and refused.stderr == "error: open_clip: has no vit (it has clip alone)\n"
    assert runner.invoke(main, ["convert", str(out), str(tmp_path / "x"), "--to", "onnx"]).exit_code == 2


def test_convert_with_what_the_file_does_not_say(tmp_path: Path) -> None:
    export(make("clip", CLIP_VIT), str(tmp_path / "clip"), "open_clip")
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    weights.rename(tmp_path / "bare.safetensors")
    arguments = ["convert", str(tmp_path / "bare.safetensors"), str(tmp_path / "hf"), "--to", "hf"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 3 and "give activation=quick-gelu" in refused.stderr
    options = ["--option", "activation=gelu", "--option", "vision.heads=2", "--option", "text.heads=3"]
    assert CliRunner().invoke(main, [*arguments, *options]).exit_code == 0
    assert read(str(tmp_path / "hf")).options["activation"] == "gelu"
    assert "no KEY=VALUE" in CliRunner().invoke(main, [*arguments, "--option", "heads"]).stderr


def test_show(out: Path) -> None:
    shown = CliRunner().invoke(main, ["show", str(out)]).output
    assert "format      Hugging Face vit\n" in shown and f"parameters  {load(str(out)).parameter_count:,}\n" in shown
    facts = json.loads(CliRunner().invoke(main, ["show", str(out), "--json"]).output)
    assert facts["family"] == "vit" and facts["options"]["width"] == 32 and facts["mean"] is None


def test_from_a_shell(out: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline.models.formats", "show", str(out / "nothing")], capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr == f"error: {out}/nothing: there is no such file or directory\n" and not done.stdout
