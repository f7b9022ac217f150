"""Checkpoint files: what is read, what is refused with which words, and that a refusal leaves the model as it was."""

import argparse
import collections
import dataclasses
import functools
import hashlib
import os
import pickle
import tempfile
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from revbifpn import RevBiFPN, configs, fast, load_checkpoint, revbifpn_s0, save_checkpoint
from revbifpn import model as plain
from revbifpn.checkpoints import CheckpointError, LoadReport, load_published
from revbifpn.configs import CONFIGS
from tests.marks import covering, mostly_slow
from tests.networks import TWO_LEVELS

pytestmark = covering

NARROW = TWO_LEVELS | {"channels": [48, 64], "num_ext_layers": 1, "head_channels": [16, 32]}
FORMATS = [".pth.tar", ".safetensors"]


def scrambled(model, seed=0):
    """The model with every tensor of its state dict, buffers and counters too, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) * 100)
    return model


def make(seed=0, cls=RevBiFPN, **overrides):
    return scrambled(cls(**(NARROW | overrides)), seed)


def bits(model):
    return {name: (value.dtype, value.numpy().tobytes()) for name, value in model.state_dict().items()}


@functools.cache
def saved_bits():
    """Of the model in :func:`file`."""
    return bits(make())


@functools.cache
def saved_bytes(suffix):
    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint(make(), f"{directory}/model{suffix}")
        return Path(directory, f"model{suffix}").read_bytes()


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def model():
    """What files are loaded into; no value is that of the files."""
    return make(seed=1)


@pytest.fixture
def refused(model):
    """``refused(path, match)``: loading raises one clear line that names the path, and changes nothing."""

    def check(path, match, error=CheckpointError, **options):
        before = bits(model)
        with pytest.raises(error, match=match) as caught:
            load_checkpoint(model, path, **options)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message
        assert "weights_only=False" not in message
        assert bits(model) == before
        return caught.value

    return check


@pytest.fixture(params=FORMATS)
def file(request, tmp_path):
    """A good checkpoint of ``make(seed=0)``, in either format, in a directory with a space in its name."""
    path = tmp_path / "my runs" / f"best model{request.param}"
    path.parent.mkdir()
    path.write_bytes(saved_bytes(request.param))
    return path


# Saving and loading -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_round_trip_returns_every_bit(file, model, kind):
    assert load_checkpoint(model, kind(file)) == LoadReport()
    assert bits(model) == saved_bits()


@pytest.mark.parametrize("suffix", FORMATS)
def test_round_trip_keeps_nan_payloads_and_signed_zeros(tmp_path, suffix, model):
    source = make()
    special = torch.tensor([0x7FC01234, -0x80000000, 1], dtype=torch.int32).view(torch.float32)  # NaN, -0, subnormal
    source.head.fc.bias.data[:3] = special
    save_checkpoint(source, tmp_path / f"model{suffix}")
    load_checkpoint(model, tmp_path / f"model{suffix}")
    assert bits(model) == bits(source)


@pytest.mark.parametrize("suffix", FORMATS)
def test_strided_weights_and_views_are_saved_as_what_they_show(tmp_path, suffix):
    source, target = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), nn.Conv2d(4, 8, 3)
    source.bias.data = torch.randn(1_000_000)[::2][:8]
    save_checkpoint(source, tmp_path / f"model{suffix}")
    assert (tmp_path / f"model{suffix}").stat().st_size < 10_000
    load_checkpoint(target, tmp_path / f"model{suffix}")
    assert torch.equal(target.weight, source.weight) and torch.equal(target.bias, source.bias)


def test_saved_files_are_what_their_suffix_says_with_published_names(file):
    load = safetensors.torch.load_file if file.suffix == ".safetensors" else torch.load
    state = load(file)
    assert sorted(state) == sorted(make().state_dict())
    fresh = make(seed=2)
    fresh.load_state_dict(state, strict=True)
    assert bits(fresh) == saved_bits()


def test_equal_models_give_equal_files(file):
    before = digest(file)
    save_checkpoint(make(), file)
    assert digest(file) == before
    save_checkpoint(make(seed=2), file)
    assert digest(file) != before


def test_interrupted_save_keeps_the_old_file_and_leaves_no_other(file, monkeypatch):
    before = digest(file)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(safetensors.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(make(seed=2), file)
    assert digest(file) == before
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("source, target", [(RevBiFPN, fast.RevBiFPN), (fast.RevBiFPN, RevBiFPN)])
def test_plain_and_fused_models_read_each_other(tmp_path, source, target):
    save_checkpoint(make(cls=source), tmp_path / "model.pth.tar")
    model = make(seed=1, cls=target)
    load_checkpoint(model, tmp_path / "model.pth.tar")
    assert bits(model) == saved_bits()


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_training_scripts_wrappers_and_prefixes_are_understood(tmp_path, wrapper, prefix):
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    content = state if wrapper is None else {"epoch": 90, "optimizer": {"lr": 0.1}, wrapper: state}
    torch.save(content, tmp_path / "model.pth")
    assert load_checkpoint(model, tmp_path / "model.pth").complete
    assert bits(model) == bits(source)


def test_state_dict_with_metadata_in_the_legacy_format_is_read(tmp_path, model):
    state = make().state_dict()
    assert isinstance(state, collections.OrderedDict) and state._metadata
    torch.save(state, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    load_checkpoint(model, tmp_path / "model.pth")
    assert bits(model) == saved_bits()


def test_file_saved_from_a_gpu_needs_none(tmp_path, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        torch.save(make().state_dict(), tmp_path / "model.pth")
    load_checkpoint(model, tmp_path / "model.pth")
    assert bits(model) == saved_bits()


def test_wrapped_models_are_saved_and_loaded_under_published_names(file, model):
    wrapped = nn.DataParallel(model)
    load_checkpoint(wrapped, file)
    assert bits(model) == saved_bits()
    save_checkpoint(wrapped, file)
    load_checkpoint(make(seed=2), file)


def test_values_are_converted_to_the_models_dtype(file):
    model = make(seed=1).double()
    load_checkpoint(model, file)
    expected = make().double()
    assert bits(model) == bits(expected)
    assert model.head.fc.weight.dtype == torch.float64


def test_parameters_stay_the_same_objects(file, model):
    before = dict(model.named_parameters())
    load_checkpoint(model, file)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_right_hash_in_either_case_is_accepted(file, model):
    load_checkpoint(model, file, sha256=digest(file).upper())
    assert bits(model) == saved_bits()


# Files that are refused -------------------------------------------------------------------------


def test_missing_file(tmp_path, refused):
    refused(tmp_path / "none.pth", "No such file", FileNotFoundError)


def test_directory(tmp_path, refused):
    refused(tmp_path, "directory", IsADirectoryError)


def test_empty_file(tmp_path, refused):
    (tmp_path / "model.pth").touch()
    refused(tmp_path / "model.pth", "empty")


@pytest.mark.parametrize("kept", [1, 7, 9, 100, 0.5, -1])
@pytest.mark.parametrize("kind", [*FORMATS, "legacy"])
def test_truncated_file(tmp_path, refused, kind, kept):
    path = tmp_path / f"model{kind}"
    if kind == "legacy":
        torch.save(make().state_dict(), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes() if kind == "legacy" else saved_bytes(kind)
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    refused(path, "truncated")


def test_flipped_byte_is_found_by_the_hash(file, refused):
    right = digest(file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(file, f"expected {right}, got {digest(file)}", sha256=right)


def test_hash_is_checked_before_anything_is_deserialised(file, refused, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("deserialised"))
    monkeypatch.setattr(safetensors.torch, "load", lambda *args, **kwargs: pytest.fail("deserialised"))
    refused(file, "wrong sha256", sha256="0" * 64)


@pytest.mark.parametrize("sha256", ["", "a9ee012a2670", "x" * 64])
def test_what_is_no_hash_is_said(file, model, sha256):
    with pytest.raises(ValueError, match="sha256: expected 64 hexadecimal digits"):
        load_checkpoint(model, file, sha256=sha256)


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html>\n<html><body>Sign in</body></html>",
        b"\xef\xbb\xbf\r\n  <html>",
        b'<?xml version="1.0"?>\n<Error><Code>NoSuchKey</Code></Error>',
    ],
)
def test_web_page_saved_as_a_checkpoint(tmp_path, refused, page):
    (tmp_path / "model.pth.tar").write_bytes(page)
    refused(tmp_path / "model.pth.tar", "HTML or XML page")


@pytest.mark.parametrize(
    "content", [b"epoch,loss\n0,6.9\n", b"PK\x05\x06" + bytes(18), pickle.dumps({"a": 1}, protocol=2)]
)
def test_file_of_another_kind(tmp_path, refused, content):
    (tmp_path / "model.pth").write_bytes(content)
    refused(tmp_path / "model.pth", "neither by torch.save nor by safetensors")


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, refused, legacy):
    path, mark = tmp_path / "model.pth", tmp_path / "mark"
    state = dict(make().state_dict(), extra=Malicious(mark))
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    refused(path, r"refused, since reading it would run code, posix\.mkdir")
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the file does hold what it should


@pytest.mark.parametrize("extra, name", [(argparse.Namespace(lr=0.1), "argparse.Namespace"), (nn.ReLU(), "ReLU")])
def test_objects_beside_the_state_dict_are_refused(tmp_path, refused, extra, name):
    torch.save({"state_dict": make().state_dict(), "args": extra}, tmp_path / "model.pth")
    refused(tmp_path / "model.pth", f"refused, since reading it would run code, .*{name}")


@pytest.mark.parametrize(
    "content, got",
    [
        ([torch.zeros(2)], "a list"),
        (torch.zeros(2), "a Tensor"),
        ({}, "an empty dict"),
        ({"epoch": 3, "optimizer": {}}, "a dict with 'epoch': int"),
        ({"state_dict": {}}, "an empty dict"),
        ({"state_dict": {"a": torch.zeros(1), "b": 3.0}}, "a dict with 'b': float"),
        ({0: torch.zeros(1)}, "a dict with 0: Tensor"),
        ({"a": torch.zeros(1, device="meta")}, "a dict with 'a': a tensor that is not dense"),
        ({"a": torch.eye(2).to_sparse()}, "a dict with 'a': a tensor that is not dense"),
    ],
)
def test_what_is_no_state_dict(tmp_path, refused, content, got):
    torch.save(content, tmp_path / "model.pth")
    for strict in (True, False):
        refused(tmp_path / "model.pth", f"not a state dict: expected tensors by name.*got {got}", strict=strict)


def test_names_both_with_and_without_prefix(tmp_path, refused):
    state = make().state_dict()
    torch.save(dict(state, **{"module.head.fc.bias": torch.zeros(10)}), tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "both with and without the prefix")


def test_model_without_storage(file):
    with torch.device("meta"):
        model = RevBiFPN(**NARROW)
    with pytest.raises(ValueError, match=r"model: .*to_empty"):
        load_checkpoint(model, file)


# Checkpoints of another model -------------------------------------------------------------------


def save_shapes(cls_or_factory, path, **arguments):
    """A checkpoint of the right names and shapes that takes no space: every tensor is one stored zero, expanded."""
    with torch.device("meta"):
        state = cls_or_factory(**arguments).state_dict()
    torch.save({name: torch.zeros((), dtype=v.dtype).expand(v.shape) for name, v in state.items()}, path)


@pytest.mark.parametrize("arch", mostly_slow(CONFIGS, 2))
def test_scale_of_the_checkpoint_is_recognised(tmp_path, refused, monkeypatch, arch):
    monkeypatch.setattr(RevBiFPN, "_initialize", lambda *args: None)
    save_shapes(getattr(plain, arch), tmp_path / "model.pth", classes=None)
    ours = r"a RevBiFPN of channels=\[48, 64\], num_ext_layers=1"
    refused(tmp_path / "model.pth", f"this is a checkpoint of {arch}, the model is {ours}; .* unexpected")


def test_scale_of_the_model_is_recognised(tmp_path):
    save_checkpoint(make(), tmp_path / "model.pth")
    model = revbifpn_s0(classes=5, head_channels=None)
    with pytest.raises(CheckpointError, match=r"of a RevBiFPN of channels=\[48, 64\], .* the model is revbifpn_s0;"):
        load_checkpoint(model, tmp_path / "model.pth")


def test_checkpoint_of_another_network(tmp_path, refused):
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict(), tmp_path / "model.pth")
    error = refused(tmp_path / "model.pth", r"a checkpoint of something else: it has 0\.weight, 0\.bias")
    assert error.report.missing == tuple(make().state_dict())
    assert len(error.report.unexpected) == 7


def test_any_module_can_be_loaded(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    save_checkpoint(source, tmp_path / "linear.safetensors")
    load_checkpoint(target, tmp_path / "linear.safetensors")
    assert bits(target) == bits(source)


def test_other_number_of_classes_is_said_to_be_that(file, refused):
    save_checkpoint(make(classes=7), file)
    error = refused(file, "the checkpoint has 7 classes, the model 10; .*head.fc.weight.*strict=False")
    assert error.report == LoadReport(mismatched={"head.fc.weight": ((7, 32), (10, 32)), "head.fc.bias": ((7,), (10,))})


CASES = {
    "classes": ({"classes": 7}, {}),
    "no head in the model": ({}, {"classes": None}),
    "no head in the checkpoint": ({"classes": None}, {}),
    "no neck in the model": ({}, {"head_channels": None}),
    "no neck in the checkpoint": ({"head_channels": None}, {}),
    "no running statistics in the model": ({}, {"norm_kwargs": {"track_running_stats": False}}),
    "no running statistics in the checkpoint": ({"norm_kwargs": {"track_running_stats": False}}, {}),
    "more layers in the model": ({}, {"num_ext_layers": 2}),
    "wider features": ({"fc_features": 64}, {}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def misfit(request, tmp_path):
    """A checkpoint, a model, and what torch and the shapes themselves say does not fit."""
    theirs, ours = request.param
    source, model = make(**theirs), make(seed=1, **ours)
    save_checkpoint(source, tmp_path / "model.pth.tar")
    state, own = source.state_dict(), model.state_dict()
    mismatched = {k: (tuple(state[k].shape), tuple(own[k].shape)) for k in own if k in state}
    mismatched = {k: shapes for k, shapes in mismatched.items() if shapes[0] != shapes[1]}
    fitting = {k: v for k, v in state.items() if k not in mismatched}
    left_over = make(**ours).load_state_dict(fitting, strict=False)
    missing = tuple(k for k in own if k not in state)
    assert set(left_over.unexpected_keys) == state.keys() - own.keys()
    return source, model, tmp_path / "model.pth.tar", LoadReport(missing, tuple(left_over.unexpected_keys), mismatched)


def test_strict_names_what_does_not_fit_and_loads_nothing(misfit):
    _, model, path, expected = misfit
    before = bits(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    message, report = str(caught.value), caught.value.report
    assert report == expected and not report.complete
    assert bits(model) == before
    for names, kind in ((report.missing, "missing"), (report.unexpected, "unexpected")):
        assert not names or f"{len(names)} {kind}" in message or f"{len(names)} names {kind}" in message
    if "this is a checkpoint of" not in message:
        first = [*report.missing[:1], *report.unexpected[:1], *list(report.mismatched)[:1]]
        last = [*report.missing[-1:], *report.unexpected[-1:], *list(report.mismatched)[-1:]]
        assert all(name in message for name in first + last)
        assert "strict=False" in message


def test_not_strict_loads_what_fits_and_reports_the_rest(misfit):
    source, model, path, expected = misfit
    before, theirs = bits(model), bits(source)
    with pytest.warns(UserWarning) as caught:
        report = load_checkpoint(model, path, strict=False)
    assert report == expected
    rest = {*report.missing, *report.mismatched}
    after = bits(model)
    assert all(after[name] == (before if name in rest else theirs)[name] for name in after)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert f"{path}: loaded {len(after) - len(rest)} of the model's {len(after)} tensors" in message
    assert "strict=False" not in message and "\n" not in message


def test_not_strict_is_silent_where_everything_fits(file, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(model, file, strict=False).complete
    assert bits(model) == saved_bits()


def test_error_survives_pickling_with_its_report(file, refused):
    save_checkpoint(make(classes=7), file)
    error = refused(file, "7 classes")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.report == error.report and not copy.report.complete


# Published weights ------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers every path with ``body``; ``declared`` is the length that it promises."""

    body, status, declared, requests, speaks_http = b"", 200, None, 0, True
    together = threading.Barrier(1)  # so many requests are answered at the same time

    class RequestHandlerClass(BaseHTTPRequestHandler):
        def do_GET(self):
            server = self.server
            server.requests += 1
            server.together.wait(timeout=20)
            if server.speaks_http:
                self.send_response(server.status)
                self.send_header("Content-Length", str(server.declared or len(server.body)))
                self.end_headers()
            self.wfile.write(server.body)

        def log_message(self, *args):
            pass

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a checkpoint of ``make(seed=0)`` in place of the published ones; the cache is an empty directory."""
    with Server() as server:
        server.body = saved_bytes(".pth.tar")
        server.url = f"http://127.0.0.1:{server.server_port}/revbifpn_s0.pth.tar"
        server.config = dataclasses.replace(CONFIGS["revbifpn_s0"], sha256=hashlib.sha256(server.body).hexdigest())
        server.cached = tmp_path / "torch home" / "hub" / "checkpoints" / "revbifpn_s0.pth.tar"
        monkeypatch.setattr(configs, "_URL", f"http://127.0.0.1:{server.server_port}/{{arch}}.pth.tar")
        monkeypatch.setattr(torch.hub, "_hub_dir", None)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def not_downloaded(server, model):
    """``not_downloaded(*matches)``: one clear line, no file under the final name or another, model unchanged."""

    def check(*matches):
        before = bits(model)
        with pytest.raises(CheckpointError) as caught:
            load_published(model, server.config)
        message = str(caught.value)
        assert "\n" not in message
        for match in (server.config.url, str(server.cached), *matches):
            assert match in message
        assert not server.cached.parent.is_dir() or not os.listdir(server.cached.parent)
        assert bits(model) == before

    return check


def test_published_weights_are_downloaded_once(server, model):
    assert load_published(model, server.config).complete
    assert bits(model) == saved_bits()
    assert os.listdir(server.cached.parent) == ["revbifpn_s0.pth.tar"]
    other = make(seed=2)
    load_published(other, server.config)
    assert bits(other) == saved_bits()
    assert server.requests == 1


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_where_asked_for(server, model, capsys, progress):
    load_published(model, server.config, progress=progress)
    out, err = capsys.readouterr()
    assert not out and ("100%" in err) is progress


def test_file_placed_by_hand_needs_no_network(server, model):
    server.cached.parent.mkdir(parents=True)
    server.cached.write_bytes(server.body)
    load_published(model, server.config)
    assert bits(model) == saved_bits() and not server.requests


def test_pretrained_loads_through_the_factories(server, tmp_path, monkeypatch):
    published = scrambled(revbifpn_s0())
    save_checkpoint(published, tmp_path / "s0.pth.tar")
    server.body = (tmp_path / "s0.pth.tar").read_bytes()
    config = dataclasses.replace(CONFIGS["revbifpn_s0"], sha256=digest(tmp_path / "s0.pth.tar"))
    monkeypatch.setitem(CONFIGS, "revbifpn_s0", config)
    assert bits(revbifpn_s0(pretrained=True)) == bits(published)
    assert bits(fast.revbifpn_s0(True)) == bits(published)
    with pytest.raises(CheckpointError, match="1000 classes, the model 7"):
        revbifpn_s0(pretrained=True, classes=7)
    with pytest.warns(UserWarning, match="loaded 1872 of the model's 1874 tensors"):
        tuned = revbifpn_s0(pretrained=True, strict=False, classes=7)
    ours, theirs = bits(tuned), bits(published)
    assert {name for name in ours if ours[name] != theirs[name]} == {"head.fc.weight", "head.fc.bias"}


def test_transfer_that_ends_early(server, not_downloaded):
    server.declared, server.body = len(server.body), server.body[:-1000]
    not_downloaded("")


def test_altered_download(server, not_downloaded):
    server.body = bytes([*server.body[:-1], server.body[-1] ^ 1])
    not_downloaded("incomplete or altered", server.config.sha256, hashlib.sha256(server.body).hexdigest())


def test_page_in_place_of_the_file(server, not_downloaded):
    server.body = b"<html>Sign in to the network</html>"
    not_downloaded("incomplete or altered")


@pytest.mark.parametrize("status", [403, 404, 503])
def test_answer_of_the_server_is_told(server, not_downloaded, status):
    server.status = status
    not_downloaded("cannot download", f"HTTP Error {status}", "by hand")


def test_answer_that_is_not_http(server, not_downloaded):
    server.speaks_http, server.body = False, b"SSH-2.0-OpenSSH\r\n"
    not_downloaded("cannot download", "SSH-2.0", "by hand")


def test_no_network(server, not_downloaded, monkeypatch):
    with Server() as closed:
        monkeypatch.setattr(configs, "_URL", f"http://127.0.0.1:{closed.server_port}/{{arch}}.pth.tar")
    not_downloaded("cannot download", "Connection refused", "by hand")


def test_missing_local_mirror(server, not_downloaded, monkeypatch, tmp_path):
    monkeypatch.setattr(configs, "_URL", f"{tmp_path.as_uri()}/none/{{arch}}.pth.tar")
    not_downloaded("cannot download", "No such file", "by hand")


def test_cache_that_cannot_be_made(server, not_downloaded, tmp_path):
    (tmp_path / "torch home").touch()
    not_downloaded("cannot download", "Not a directory", "TORCH_HOME")
    assert not server.requests


def test_cache_that_cannot_be_written(server, not_downloaded, monkeypatch):
    def full(url, dst, *args):
        raise OSError(30, "Read-only file system", dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    not_downloaded("cannot download", "Read-only file system", "TORCH_HOME")


def test_read_only_cache_that_has_the_file_is_enough(server, model, monkeypatch):
    server.cached.parent.mkdir(parents=True)
    server.cached.write_bytes(server.body)
    server.cached.chmod(0o444)
    server.cached.parent.chmod(0o555)
    changed = server.cached.parent.stat().st_mtime_ns
    load_published(model, server.config)
    assert server.cached.parent.stat().st_mtime_ns == changed
    assert bits(model) == saved_bits()


@pytest.mark.parametrize("damage", [lambda b: b[:-1000], lambda b: b[:5000] + b"\xff" + b[5001:], lambda b: b""])
def test_damaged_file_in_the_cache_is_named_and_kept(server, refused, model, damage):
    server.cached.parent.mkdir(parents=True)
    server.cached.write_bytes(damage(server.body))
    before, found = bits(model), digest(server.cached)
    with pytest.raises(CheckpointError, match=f"expected {server.config.sha256}, got {found}.*delete") as caught:
        load_published(model, server.config)
    assert str(server.cached) in str(caught.value)
    assert bits(model) == before and digest(server.cached) == found and not server.requests
    server.cached.unlink()
    load_published(model, server.config)
    assert bits(model) == saved_bits()


def test_leftover_of_a_killed_download_is_not_taken_for_the_file(server, model):
    server.cached.parent.mkdir(parents=True)
    leftover = server.cached.with_name(f"{server.cached.name}.0123.partial")
    leftover.write_bytes(server.body[:1000])
    load_published(model, server.config)
    assert bits(model) == saved_bits() and server.requests == 1


def test_concurrent_downloads_all_succeed_and_leave_one_file(server):
    server.together = threading.Barrier(4)
    models = [make(seed=seed) for seed in range(1, 5)]
    threads = [threading.Thread(target=load_published, args=(model, server.config)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == 4
    assert all(bits(model) == saved_bits() for model in models)
    assert os.listdir(server.cached.parent) == ["revbifpn_s0.pth.tar"]
    assert digest(server.cached) == server.config.sha256


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_documentation_lists_the_published_files(config):
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    row = next(line for line in page.splitlines() if config.url in line)
    assert config.sha256 in row
