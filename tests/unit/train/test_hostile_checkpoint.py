"""A checkpoint that an attacker made, or a disk damaged: it loads as it was saved, or is refused by file and reason.

Where the files contradict the manifest, the manifest is what refuses (test_checkpoint.py); here it was made to agree,
as an attacker would.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from moba_train.config.load import load_config
from moba_train.config.schema import ParallelConfig
from moba_train.errors import CheckpointError, ConfigError
from moba_train.parallel.topology import Topology, close_topology, init_topology
from moba_train.train.checkpoint import CheckpointStore, load_checkpoint
from moba_train.train.manifest import find_damage
from moba_train.train.progress import Progress
from moba_train.train.resume import find_start
from moba_train.train.shard_checks import covers_once
from tests.mutations import Mutation, mutated, mutations
from tests.unit.train.toy import STAGES, ToyEngine, identity

WEIGHT, MOMENTUM = [1.5, -2.0], [0.25, 7.0]
SHARD = "__0_0.distcp"
FUZZ = settings(max_examples=100, deadline=None, derandomize=True)
SLACK_BYTES = 512 << 20
"""Address space that a load may take; every lie below asks for more."""


@dataclass
class Hostile:
    """A whole checkpoint, and a folder in which copies of it are changed."""

    files: dict[str, bytes]
    path: Path
    topology: Topology

    def write(self, *, reseal: bool = True, **changed: bytes) -> Path:
        """Lay the files out again; a name is given with _ for its dots and dashes."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        self.path.mkdir(parents=True)
        for name, content in self.files.items():
            (self.path / name).write_bytes(changed.pop(as_word(name), content))
        assert not changed, f"no file {changed.keys()}"
        if reseal:
            self.reseal()
        return self.path

    def reseal(self) -> None:
        """Let the manifest agree with the files; unlike `write_manifest`, without waiting for the disk."""
        contents = {file.name: file.read_bytes() for file in self.path.iterdir() if file.name != "manifest.json"}
        files = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
        (self.path / "manifest.json").write_text(json.dumps({"files": files}))

    def load(self) -> Progress:
        """Load into a new engine; what it holds then must be what was saved."""
        engine = ToyEngine(self.topology)
        progress = load_checkpoint(self.path, engine, identity())
        assert engine.weight.tolist() == WEIGHT and engine.momentum.tolist() == MOMENTUM
        return progress

    def refusal(self) -> CheckpointError:
        """The error of a load, which must come before memory is taken for a lie."""
        with little_memory(), pytest.raises(CheckpointError) as caught:
            self.load()
        assert str(self.path) in caught.value.where and caught.value.fix
        assert "memory" not in caught.value.message().lower()
        assert len(caught.value.message()) < 2000
        return caught.value


def as_word(name: str) -> str:
    return name.replace(".", "_").replace("-", "_")


@contextmanager
def little_memory() -> Iterator[None]:
    """Beyond SLACK_BYTES more than now, reserving memory fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SLACK_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    topology = init_topology(ParallelConfig(), device=torch.device("cpu"), timeout_s=60.0)
    engine = ToyEngine(topology)
    engine.weight = torch.tensor(WEIGHT, dtype=torch.float64)
    engine.momentum = torch.tensor(MOMENTUM, dtype=torch.float64)
    run_dir = tmp_path_factory.mktemp("whole")
    store = CheckpointStore(run_dir, identity(), "[run]\nseed = 7\n", STAGES, 2)
    store.save(engine, Progress(3, 0, 3, 48), stage_end=False)
    store.finish()
    path = run_dir / "checkpoints" / "step_00000003"
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    yield Hostile(files, tmp_path_factory.mktemp("run") / "checkpoints" / path.name, topology)
    close_topology()


# ---- the manifest


def manifest(name: str = "x", num_bytes: str = "1", sha256: str = '"' + "0" * 64 + '"') -> bytes:
    return f'{{"files": {{{json.dumps(name)}: {{"bytes": {num_bytes}, "sha256": {sha256}}}}}}}'.encode()


MANIFESTS = {
    **{
        f"the name {name[:12]!r}": manifest(name)
        for name in ("../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", "x" * 5000, "\ud800", "a\nb")
    },
    **{
        f"{num_bytes[:9]} bytes": manifest(num_bytes=num_bytes)
        for num_bytes in ("-1", "1.5", '"1"', "true", "null", "1e999", "NaN", "[]", "9" * 5000)
    },
    **{
        f"the hash {sha256[:9]}": manifest(sha256=sha256)
        for sha256 in ("1", "null", '""', '"' + "g" * 64 + '"', '"' + "0" * 65 + '"')
    },
    "a file twice": b'{"files": {"x": {"bytes": 1, "sha256": "%s"}, "x": {"bytes": 1, "sha256": "%s"}}}'
    % (b"0" * 64, b"1" * 64),
    "files twice": manifest()[:-1] + b"," + manifest()[1:],
    "nested lists": b"[" * 200_000,
    "nested tables": b'{"files":' * 50_000,
    "a list": b"[]",
    "a number": b"5",
    "no files": b"{}",
    "a list of files": b'{"files": ["x"]}',
    "an entry that is a list": b'{"files": {"x": []}}',
    "nothing": b"",
    "no text": b"\xff\xfe\x00",
    "a pickle": pickle.dumps({"files": {}}),
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_hostile_manifest_is_refused(hostile: Hostile, content: bytes) -> None:
    hostile.write(manifest_json=content, reseal=False)
    with little_memory():
        assert find_damage(hostile.path).startswith("manifest.json ")
    assert "manifest.json " in str(hostile.refusal().got)


def test_a_manifest_of_a_gigabyte_is_not_read(hostile: Hostile) -> None:
    os.truncate(hostile.write(reseal=False) / "manifest.json", 1 << 30)
    assert "larger than" in str(hostile.refusal().got)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", ".metadata", "common.pt", SHARD])
@pytest.mark.parametrize("kind", ["link out of the folder", "pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_unopened(hostile: Hostile, tmp_path: Path, name: str, kind: str) -> None:
    file = hostile.write() / name
    if kind == "link out of the folder":
        shutil.move(file, tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.unlink()
        make: dict[str, Callable[[], None]] = {
            "pipe": lambda: os.mkfifo(file),
            "folder": file.mkdir,
            "device": lambda: file.symlink_to("/dev/zero"),
        }
        make[kind]()
    assert name in hostile.refusal().message()


def test_a_file_that_the_manifest_leaves_out_is_not_read(hostile: Hostile) -> None:
    entries = json.loads((hostile.write() / "manifest.json").read_text())["files"]
    del entries[SHARD]
    (hostile.path / "manifest.json").write_text(json.dumps({"files": entries}))
    assert SHARD in str(hostile.refusal().got)


@settings(FUZZ, max_examples=300)
@given(changes=mutations())
@example(changes=[])
def test_a_changed_manifest_is_refused_or_means_the_same(hostile: Hostile, changes: list[Mutation]) -> None:
    content = mutated(hostile.files["manifest.json"], changes)
    hostile.write(manifest_json=content, reseal=False)
    damage = find_damage(hostile.path)
    assert damage or json.loads(content)["files"].items() <= json.loads(hostile.files["manifest.json"])["files"].items()


# ---- .metadata: tables


def metadata_of(hostile: Hostile) -> Metadata:
    metadata = pickle.loads(hostile.files[".metadata"])  # ours, made a moment ago
    assert isinstance(metadata, Metadata)
    return metadata


def place(metadata: Metadata, name: str) -> Any:
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def change(at: str, **values: object) -> Callable[[Metadata], None]:
    """Set fields of weight's table: its "tensor", the only "piece" of it, or the "place" of that."""

    def apply(metadata: Metadata) -> None:
        tensor = metadata.state_dict_metadata["weight"]
        part = {"tensor": tensor, "piece": tensor.chunks[0], "place": place(metadata, "weight")}[at]
        for name, value in values.items():
            object.__setattr__(part, name, value)

    return apply


def pieces(*boxes: tuple[int, int]) -> Callable[[Metadata], None]:
    return change("tensor", chunks=[ChunkStorageMetadata(torch.Size([at]), torch.Size([n])) for at, n in boxes])


def placed_like_momentum(metadata: Metadata) -> None:
    place(metadata, "weight").offset = place(metadata, "momentum").offset


def without_place(metadata: Metadata) -> None:
    metadata.storage_data = {index: at for index, at in metadata.storage_data.items() if index.fqn != "weight"}


TABLES: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "a path out of the folder": (change("place", relative_path="../../x"), "no shard of this checkpoint"),
    "an absolute path": (change("place", relative_path="/etc/passwd"), "no shard of this checkpoint"),
    "a path with a NUL": (change("place", relative_path=SHARD + "\0"), "no shard of this checkpoint"),
    "a path that is no text": (change("place", relative_path=7), "no shard of this checkpoint"),
    "another file of the folder": (change("place", relative_path="state.json"), "no shard of this checkpoint"),
    "a shard that is not there": (change("place", relative_path="__1_0.distcp"), "no shard of this checkpoint"),
    "an offset past the end": (change("place", offset=1 << 40), "reach beyond"),
    "a length past the end": (change("place", length=1 << 40), "reach beyond"),
    "a negative offset": (change("place", offset=-8), "whole number"),
    "a negative length": (change("place", length=-1), "whole number"),
    "an offset that is no number": (change("place", offset="0"), "whole number"),
    "an offset beyond int64": (change("place", offset=1 << 90), "whole number"),
    "a length shorter than the content": (change("place", length=8), "has 8 bytes"),
    "a compressed piece": (change("place", transform_descriptors=["zstd"]), "compressed"),
    "two pieces in one place": (placed_like_momentum, "overlap"),
    "a piece without a place": (without_place, "lies nowhere"),
    "places that are no table": (lambda m: setattr(m, "storage_data", [1]), "list of places"),
    "tensors that are no table": (lambda m: setattr(m, "state_dict_metadata", None), "NoneType|list of tensors"),
    "a shape of terabytes": (change("tensor", size=torch.Size([1 << 42])), "cover"),
    "a negative shape": (change("tensor", size=torch.Size([-2])), "whole number"),
    "a shape that is no shape": (change("tensor", size="2"), "shape of tensor weight"),
    "a hundred dims": (change("tensor", size=torch.Size([1] * 100)), "shape of tensor weight"),
    "a huge piece": (pieces((0, 1 << 42)), "cover"),
    "a piece of negative size": (pieces((0, -2)), "whole number"),
    "overlapping pieces": (pieces((0, 2), (1, 1)), "cover"),
    "the same piece twice": (pieces((0, 1), (0, 1)), "cover"),
    "a missing piece": (pieces((0, 1)), "cover"),
    "no piece": (pieces(), "cover"),
    "pieces of terabytes that agree with the shape": (
        lambda m: (change("tensor", size=torch.Size([1 << 42]))(m), pieces((0, 1 << 42))(m))[0],
        "or the tensor has no such piece",
    ),
    "no dtype": (lambda m: setattr(m.state_dict_metadata["weight"].properties, "dtype", "float64"), "dtype"),
    "a tensor that is a number": (lambda m: m.state_dict_metadata.update(weight=5), "no tensor"),
    "a name that is a number": (lambda m: m.state_dict_metadata.update({5: 5}), "no tensor"),
}


@pytest.mark.parametrize(("lie", "reason"), TABLES.values(), ids=TABLES.keys())
def test_a_lie_in_the_tables_of_metadata_is_refused(
    hostile: Hostile, lie: Callable[[Metadata], None], reason: str
) -> None:
    metadata = metadata_of(hostile)
    lie(metadata)
    hostile.write(_metadata=pickle.dumps(metadata, protocol=4))
    error = hostile.refusal()
    assert error.where.endswith(".metadata")
    assert any(part in str(error.got) for part in reason.split("|")), error.message()


def test_pieces_that_cover_a_tensor_are_told_from_those_that_do_not() -> None:
    grid = [((i, j), (2, 3)) for i in (0, 2) for j in (0, 3)]
    assert covers_once((4, 6), grid) and covers_once((), [((), ())]) and covers_once((0, 5), [])
    windmill = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((1, 0), (2, 1)), ((2, 1), (1, 2)), ((1, 1), (1, 1))]
    assert covers_once((3, 3), windmill)
    assert not covers_once((3, 3), windmill[:-1])  # a hole
    assert not covers_once((4, 6), [*grid, grid[0]]) and not covers_once((4, 6), [*grid[:3], grid[0]])
    assert not covers_once((4, 6), [*grid[:3], ((2, 4), (2, 3))])  # the right volume, in the wrong place
    assert not covers_once((), [])


# ---- .metadata: the program


class Malice:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('pwned').touch()",)


def laughs(depth: int) -> bytes:
    """(x, x) where x = (y, y) and so on: few bytes, and hashing it takes for ever."""
    return b"\x80\x04}(" + b")\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(depth)) + b"Nu."


PROGRAMS = {
    "code": (pickle.dumps(Malice(), protocol=4), "exec"),
    "code in an old protocol": (pickle.dumps(Malice(), protocol=0), "no metadata needs"),
    "a name outside the list": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    "a name below an allowed module": (b"\x80\x04\x8c\x05torch\x8c\x04load\x93.", "torch.load"),
    "a dotted name": (b"\x80\x04\x8c\x07pathlib\x8c\x10PosixPath.unlink\x93.", "PosixPath.unlink"),
    "a memo of 64 GB": (b"\x80\x04Nr\xff\xff\xff\xff.", "LONG_BINPUT"),
    "bytes of terabytes": (b"\x80\x04\x8e" + (1 << 42).to_bytes(8, "little") + b".", "not a pickle|needs"),
    "a text of terabytes": (b"\x80\x04\x8d" + (1 << 42).to_bytes(8, "little") + b".", "not a pickle|needs"),
    "a frame of terabytes": (b"\x80\x04\x95" + (1 << 42).to_bytes(8, "little") + b"N.", "UnpicklingError|SuspectFile"),
    "a class that is changed": (
        b"\x80\x04\x8c\x07pathlib\x8c\x09PosixPath\x93N}\x8c\x04openNs\x86b.",
        "it changes a class",
    ),
    "a value that is called": (b"\x80\x04K\x01)R.", "it calls a value"),
    "persistent objects": (b"\x80\x04K\x01Q.", "BINPERSID"),
    "a registered extension": (b"\x80\x04\x82\x01.", "EXT1"),
    "a value that repeats itself": (laughs(60), "repeats itself"),
    "nothing": (b"", "not a pickle"),
    "a table": (pickle.dumps({}, protocol=4), "holds a dict"),
    "missing operands": (b"\x80\x04R.", "not a pickle"),
    "an empty Metadata": (
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93)\x81.",
        "",
    ),
}


@pytest.mark.parametrize(("program", "reason"), PROGRAMS.values(), ids=PROGRAMS.keys())
def test_metadata_that_does_more_than_build_tables_is_refused(
    hostile: Hostile, program: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile.write(_metadata=program)
    error = hostile.refusal()
    assert error.where.endswith(".metadata")
    assert any(part in str(error.got) for part in reason.split("|")), error.message()
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_two_gigabytes_is_not_read(hostile: Hostile) -> None:
    os.truncate(hostile.write() / ".metadata", 2 << 30)
    entries = json.loads((hostile.path / "manifest.json").read_text())["files"]
    with pytest.raises(CheckpointError, match="larger than") as caught:
        from moba_train.train.megatron_io import read_metadata

        with little_memory():
            read_metadata(hostile.path)
    assert entries and caught.value.where.endswith(".metadata")


# ---- shards and common.pt


def saved(value: object, *, old_format: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not old_format)
    return stream.getvalue()


def packed(content: bytes, **changed: bytes) -> bytes:
    """An archive of torch.save with compressed entries, and others in the place of some."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            last = entry.filename.partition("/")[2]
            new.writestr(entry.filename, changed.get(as_word(last).replace("/", "_"), old.read(entry)))
    return stream.getvalue()


COMMONS = {
    "code": (saved({"content": Malice()}), "exec"),
    "a name outside tensors": (saved({"content": Path("x")}), "pathlib"),
    "the old format": (saved({}, old_format=True), "not an archive"),
    "a bare pickle": (pickle.dumps({}), "not an archive"),
    "a bomb": (packed(saved({}), version=b"0" * (64 << 20)), "compressed"),
    "a foreign entry": (
        packed(saved({})).replace(b"byteorder", b"constants"),
        "archive holds",
    ),
    "bytes behind the archive": (saved({}) + b"x", "does not"),
    "a second archive behind the first": (saved({}) + saved({"content": Malice()}), "does not end|exec"),
    "no table": (saved([1]), "no table"),
    "a model that is a number": (saved({"model": 5}), ""),
    "nothing": (b"", "not an archive"),
}


@pytest.mark.parametrize(("content", "reason"), COMMONS.values(), ids=COMMONS.keys())
def test_hostile_common_values_are_refused(
    hostile: Hostile, content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # the user's, for another program
    hostile.write(common_pt=content)
    error = hostile.refusal()
    assert any(part in error.message() for part in reason.split("|")), error.message()
    assert list(tmp_path.iterdir()) == []


def with_weight(hostile: Hostile, content: bytes) -> None:
    """Put another archive where weight's piece was, behind the rest of the shard."""
    metadata = metadata_of(hostile)
    shard = hostile.files[SHARD]
    at = place(metadata, "weight")
    at.offset, at.length = len(shard), len(content)
    hostile.write(_metadata=pickle.dumps(metadata, protocol=4), **{as_word(SHARD): shard + content})


DOUBLES = saved(torch.tensor(WEIGHT, dtype=torch.float64))
PIECES = {
    "code": (saved(Malice()), "exec"),
    "the old format": (saved(torch.zeros(2, dtype=torch.float64), old_format=True), "not an archive"),
    "a compressed piece": (packed(DOUBLES), "compressed"),
    "a bomb": (packed(DOUBLES, data_0=b"\0" * (64 << 20)), "compressed"),
    "another shape": (saved(torch.zeros(1, dtype=torch.float64)), "8 bytes instead of 16"),
    "no tensor": (saved({"a": list(range(9))}), ""),
    "noise": (b"PK\x03\x04" + bytes(range(256)), "does not"),
}


@pytest.mark.parametrize(("content", "reason"), PIECES.values(), ids=PIECES.keys())
def test_a_hostile_piece_of_a_tensor_is_refused(hostile: Hostile, content: bytes, reason: str) -> None:
    with_weight(hostile, content)
    error = hostile.refusal()
    assert any(part in error.message() for part in reason.split("|")), error.message()


def test_a_piece_that_torch_saved_is_read(hostile: Hostile) -> None:
    with_weight(hostile, DOUBLES)
    assert hostile.load().step == 3


FORMATS = [
    *(b"{}", b"[]", b"5", b"null", b"[" * 100_000, b'{"sharded_backend": "zarr"}', b'{"sharded_backend": ["x"]}'),
    b'{"sharded_backend": "torch_dist", "common_backend": "../../x"}',
    b'{"sharded_backend": "torch_dist", "x": 1}',
]


@pytest.mark.parametrize("content", FORMATS, ids=range(len(FORMATS)))
def test_a_hostile_name_of_the_format_is_refused(hostile: Hostile, content: bytes) -> None:
    hostile.write(metadata_json=content)
    assert hostile.refusal().where.endswith("metadata.json")


@pytest.mark.parametrize("name", [".metadata", SHARD, "common.pt", "metadata.json"])
@FUZZ
@given(changes=mutations())
@example(changes=[])
def test_a_changed_file_whose_manifest_agrees_loads_right_or_is_refused(
    hostile: Hostile, name: str, changes: list[Mutation]
) -> None:
    hostile.write(**{as_word(name): mutated(hostile.files[name], changes)})
    try:
        assert hostile.load().step == 3
    except CheckpointError as error:
        assert str(hostile.path) in error.where
        assert changes


# ---- state.json and config.toml


STATES: dict[str, object] = {
    **{
        f"{key} = {value!r:.20}": {key: value}
        for key in ("step", "stage_index", "step_in_stage", "tokens", "bad_steps")
        for value in (-1, "x", None, [], {}, 1.5, True, float("inf"), 10**400)
    },
    **{f"{key} = {value!r}": {key: value} for key in ("model", "stage_rows") for value in (5, None, [], "x")},
    **{f"{key} = {value!r}": {key: value} for key in ("tokenizer", "seed") for value in (None, [], {}, "x")},
    "another step than the folder's name": {"step": 4},
}


@pytest.mark.parametrize("changed", STATES.values(), ids=STATES.keys())
def test_a_hostile_state_is_refused(hostile: Hostile, changed: dict[str, object]) -> None:
    state = json.loads(hostile.files["state.json"]) | changed
    hostile.write(state_json=json.dumps(state).encode())
    assert "state.json" in hostile.refusal().message() or "tokenizer" in changed or "seed" in changed


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"{}", b"[" * 100_000, b"\xff", b'{"step": 3, "step": 3}'])
def test_a_state_that_is_no_table_is_refused(hostile: Hostile, content: bytes) -> None:
    hostile.write(state_json=content)
    assert "state.json" in hostile.refusal().message()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        find_start(hostile.path.parent.parent, "auto")


def test_a_state_of_a_gigabyte_is_not_read(hostile: Hostile) -> None:
    os.truncate(hostile.write() / "state.json", 1 << 30)
    hostile.refusal()


@FUZZ
@given(changes=mutations())
def test_a_changed_state_is_read_or_refused(hostile: Hostile, changes: list[Mutation]) -> None:
    hostile.write(state_json=mutated(hostile.files["state.json"], changes))
    try:
        hostile.load()
    except CheckpointError as error:
        assert str(hostile.path) in error.where


TOMLS = [b"a = " + b"[" * 100_000, b"\xff", b"run = 5", b"run.seed = 1e999", b"stages = [[]]", b"a.b = 1", b"=", b"\0"]


@pytest.mark.parametrize("content", TOMLS, ids=range(len(TOMLS)))
def test_a_hostile_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.toml")


@FUZZ
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_as_a_configuration_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(path)
