"""experiments/cifar10.py, with a small archive of the same format, from a server or a file."""

import hashlib
import http.server
import io
import sys
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from common import cli
from experiments import cifar10


@pytest.fixture(scope="module")
def records() -> dict[str, np.ndarray]:
    """For each file of the archive its records, uint8 [20, 3073], the classes in turn."""
    rng = np.random.default_rng(0)
    records = {}
    for name in (*cifar10.FILES["train"], *cifar10.FILES["test"]):
        records[name] = rng.integers(256, size=(20, 3073), dtype=np.uint8)
        records[name][:, 0] = np.arange(20) % 10
    return records


def make_archive(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return archive.getvalue()


@pytest.fixture(scope="module")
def archive(records) -> bytes:
    return make_archive({name: data.tobytes() for name, data in records.items()})


@pytest.fixture
def serve(archive):
    """Function: whether the server can begin in the middle -> (its URL, what it was asked for, and
    a dict of which "data" is what it sends, and "cut" the bytes after which it hangs up)."""
    servers = []

    def start(ranges: bool):
        asked = []
        state = {"data": archive, "cut": None}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                begin = 0
                asked.append(self.headers["Range"])
                if ranges and self.headers["Range"]:
                    begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                rest = state["data"][begin:]
                if begin and not rest:
                    self.send_error(416)
                    return
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", len(rest))
                self.end_headers()
                self.wfile.write(rest[: state["cut"]])

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/cifar.tar.gz", asked, state

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def fetch(tmp_path, monkeypatch, capsys, archive):
    """Function: runs the script in tmp_path -> (exit code, the last line that it printed)."""
    monkeypatch.chdir(tmp_path)

    def run(source, md5: str | None = None) -> tuple[int, str]:
        md5 = md5 or hashlib.md5(archive).hexdigest()
        words = ["cifar10.py", "--archive", str(source), "--md5", md5]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.command_line(cifar10.main)
        printed = capsys.readouterr()
        text = printed.err if ended.value.code else printed.out
        return ended.value.code or 0, text.strip().splitlines()[-1]

    return run


def check_folders(folder, records):
    """Every record is there, under its class, in the archive's order."""
    for split, names in cifar10.FILES.items():
        rows = np.concatenate([records[name] for name in names])
        assert sorted(path.name for path in (folder / split).iterdir()) == cifar10.CLASSES
        for label, name in enumerate(cifar10.CLASSES):
            expected = rows[rows[:, 0] == label, 1:].reshape(-1, 3, 32, 32)
            paths = sorted((folder / split / name).iterdir())
            assert [path.name for path in paths] == [f"{i:04d}.png" for i in range(len(expected))]
            for path, pixels in zip(paths, expected):
                assert np.array_equal(np.asarray(Image.open(path)), pixels.transpose(1, 2, 0))


def test_a_local_archive(fetch, tmp_path, archive, records):
    (tmp_path / "a.tar.gz").write_bytes(archive)
    assert fetch("a.tar.gz") == (0, "wrote cifar10/train, cifar10/test")
    check_folders(tmp_path / "cifar10", records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "cifar10"]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(fetch, serve, tmp_path, archive, records, ranges):
    url, asked, state = serve(ranges)
    half = len(archive) // 2
    state["cut"] = half
    code, line = fetch(url)
    assert code == 2
    assert line.startswith(f"error: {url}: ") and "run it again" in line
    assert (tmp_path / "cifar10.tar.gz.part").read_bytes() == archive[:half]
    state["cut"] = None
    assert fetch(url)[0] == 0
    assert asked == [None, f"bytes={half}-"]
    check_folders(tmp_path / "cifar10", records)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar10"]


def test_a_download_that_only_lacked_its_name(fetch, serve, tmp_path, archive, records):
    url, _, _ = serve(ranges=True)
    (tmp_path / "cifar10.tar.gz.part").write_bytes(archive)
    assert fetch(url)[0] == 0
    check_folders(tmp_path / "cifar10", records)


def test_a_damaged_download_is_fetched_anew(fetch, serve, tmp_path, archive, records):
    url, _, state = serve(ranges=True)
    state["data"] = archive[:-100] + bytes(100)
    code, line = fetch(url)
    assert code == 2
    assert line.startswith("error: cifar10.tar.gz: damaged, or another file: MD5 ")
    assert list(tmp_path.iterdir()) == []
    state["data"] = archive
    assert fetch(url)[0] == 0


def test_a_folder_that_was_half_unpacked_is_begun_anew(fetch, tmp_path, archive, records):
    (tmp_path / "a.tar.gz").write_bytes(archive)
    (tmp_path / "cifar10.part" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "cifar10.part" / "train" / "cat" / "4000.png").touch()
    assert fetch("a.tar.gz")[0] == 0
    check_folders(tmp_path / "cifar10", records)


WRONG_FILES = {
    "no tar": b"no archive",
    "another tar": make_archive({"readme.txt": b"hello"}),
    "half": make_archive({"cifar-10-batches-bin/data_batch_1.bin": bytes(5000)})[:60],
    "half a record": make_archive({"cifar-10-batches-bin/data_batch_1.bin": bytes(5000)}),
    "class 200": make_archive({"cifar-10-batches-bin/data_batch_1.bin": bytes([200]) * 3073}),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_another_archive_is_one_line(fetch, tmp_path, kind):
    data = WRONG_FILES[kind]
    (tmp_path / "a.tar.gz").write_bytes(data)
    code, line = fetch("a.tar.gz", hashlib.md5(data).hexdigest())
    assert code == 2
    assert line.startswith("error: a.tar.gz: not CIFAR-10's binary archive (")
    assert not (tmp_path / "cifar10").exists()


def test_the_checksum_is_that_of_the_authors(fetch, tmp_path, archive):
    (tmp_path / "a.tar.gz").write_bytes(archive)
    code, line = fetch("a.tar.gz", cifar10.MD5)
    assert code == 2
    assert line.endswith("not c32a1d4ab5d03f1284b67883e8d87530")
    assert (tmp_path / "a.tar.gz").exists()


def test_no_server_and_no_file_are_one_line(fetch):
    assert fetch("nowhere.tar.gz")[0] == 2
    code, line = fetch("http://127.0.0.1:1/cifar.tar.gz")
    assert code == 2
    assert line.startswith("error: http://127.0.0.1:1/cifar.tar.gz: ")


def test_an_existing_folder_is_left_alone(fetch, tmp_path):
    (tmp_path / "cifar10").mkdir()
    assert fetch("a.tar.gz")[1] == (
        "error: cifar10: exists already; remove it or choose another --out"
    )
