"""The harness that runs other servers beside ours, against small servers of its own."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers.checkpoint import fill_vocabulary
from benchmarks.peers.environments import INSIDE, PeerError, make_once, run_logged
from benchmarks.peers.ours import CACHE_TOKENS, count_cache_bytes, launch_ours
from benchmarks.peers.processes import Launch, Server, list_session, read_pss
from benchmarks.peers.table import Row, format_report, format_sitting
from benchmarks.peers.work import Measurement, Task, measure, medians, take_turns

ROOT = Path(__file__).resolve().parents[2]

# Sends a token each 10 ms, the first after 50 ms; `short_by` tokens are missing at the end.
SMALL_SERVER = """
import queue, sys, time
sys.path.insert(0, sys.argv[1])
from sse_server import serve
jobs = queue.SimpleQueue()
serve(int(sys.argv[2]), jobs)
while True:
    job = jobs.get()
    time.sleep(0.05)
    for number in range(job.max_tokens - int(sys.argv[3])):
        job.put(number)
        time.sleep(0.01)
    job.end()
"""


def small_launch(name: str, short_by: int = 0) -> Launch:
    words = (sys.executable, "-c", SMALL_SERVER, str(INSIDE), "{port}", str(short_by))
    return Launch(name, words)


@pytest.fixture
def small_server(tmp_path):
    with Server(small_launch("small"), tmp_path / "small.log") as server:
        server.wait_until_ready()
        yield server


def test_figures_are_those_of_the_server(small_server):
    task = Task("one", 1, 16, 21, lambda summary: {"tpot": summary["tpot_ms"]["mean"],
                                                   "ttft": summary["ttft_ms"]["mean"]})  # fmt: skip
    figures = measure(small_server, task, seed=0).figures
    assert 10 <= figures["tpot"] < 40
    assert 50 <= figures["ttft"] < 500
    assert small_server.peak_memory > 2**20


def test_an_answer_that_is_too_short_is_no_figure(tmp_path):
    with Server(small_launch("short", short_by=3), tmp_path / "log") as server:
        server.wait_until_ready()
        with pytest.raises(PeerError, match="the stream ended early"):
            measure(server, Task("one", 1, 4, 8, lambda summary: {}), seed=0)


def test_servers_take_turns_within_each_round(small_server, tmp_path, monkeypatch):
    order = []
    work = sys.modules["benchmarks.peers.work"]
    monkeypatch.setattr(
        work,
        "measure",
        lambda server, task, seed: (
            order.append((server.launch.name, task.name, seed)) or Measurement({}, 0.0)
        ),
    )
    other = Server(small_launch("other"), tmp_path / "other.log")
    with other:
        take_turns([small_server, other], {"short": 2})
    assert [entry for entry in order if entry[1] == "short"] == [
        ("small", "short", 0), ("other", "short", 0), ("small", "short", 1), ("other", "short", 1),
    ]  # fmt: skip


def test_disturbed_rounds_count_only_when_there_are_no_others():
    def one(value, others):
        return Measurement({"speed": value}, others)

    assert medians([one(10, 0.0), one(1, 0.5), one(12, 0.01)]) == {"speed": 11}
    assert medians([one(2, 0.6), one(1, 0.5), one(3, 0.9)]) == {"speed": 2}


def test_a_server_that_cannot_start_is_named_with_its_log(tmp_path):
    launch = Launch("broken", (sys.executable, "-c", "raise SystemExit(3)"))
    with (
        Server(launch, tmp_path / "broken.log") as server,
        pytest.raises(PeerError, match=r"broken ended with 3 .*broken\.log"),
    ):
        server.wait_until_ready()


def test_no_process_of_a_server_stays_behind(tmp_path):
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(99)']"
    child = f"import subprocess, sys; subprocess.run({sleeper})"
    with Server(Launch("parent", (sys.executable, "-c", child)), tmp_path / "log") as server:
        deadline = time.monotonic() + 20
        while len(processes := server.processes()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(processes) == 2
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{one}/exe") for one in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_pss_counts_what_a_process_touches():
    before = read_pss(os.getpid())
    block = bytearray(os.urandom(64 * 2**20))
    assert 60 * 2**20 < read_pss(os.getpid()) - before < 90 * 2**20
    assert block
    assert os.getpid() in list_session(os.getsid(0))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("sym_int4:2x1", ["-np", "2", "--low-bit sym_int4", "OMP 1"]),
        ("sym_int8:1x2", ["--low-bit sym_int8", "OMP 2"]),
        ("sym_int4/sym_int4:1x2", ["--lm-head-low-bit sym_int4"]),
    ],
)
def test_our_server_is_started_as_asked(tmp_path, monkeypatch, spec, expected):
    (tmp_path / "mpirun").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    launch = launch_ours(Path("/model"), spec, 2**20)
    text = f"{' '.join(launch.words)} OMP {launch.environment['OMP_NUM_THREADS']}"
    assert all(part in text for part in expected)


def test_a_misspelt_layout_is_refused():
    with pytest.raises(PeerError, match="--ours sym_int4:two"):
        launch_ours(Path("/model"), "sym_int4:two", 2**20)


def test_the_tokenizer_gets_a_text_for_every_token(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9000}))
    source = json.loads((ROOT / "demo_model" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    fill_vocabulary(tmp_path)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 9000
    assert all(tokenizer.decode([number]).strip() for number in range(8192, 9000))
    assert tokenizer.decode([8999]) == " word8999"


def test_cache_bytes_hold_the_widest_task(tmp_path):
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
              "num_hidden_layers": 3}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert count_cache_bytes(tmp_path) == CACHE_TOKENS * 3 * 2 * 2 * 16 * 2


def test_the_table_sets_our_first_row_against_the_peer():
    rows = [
        Row("ours", {"decode_tok_s": 30.0, "memory_mib": 1000.0}),
        Row("ours too", {"decode_tok_s": 99.0}),
        Row("peer", {"decode_tok_s": 20.0, "memory_mib": 800.0}),
    ]
    lines = format_sitting(rows)
    assert lines[0] == "| server | decode, tok/s | PSS, MiB |"
    assert lines[-1] == "| ours : peer | **1.50** | 0.80 |"


def test_results_can_be_shown_again(tmp_path, capsys):
    report = {
        "machine": "a machine", "date": "a day", "ours": "ours at abc", "versions": {"peer": "1"},
        "shape": "tiny", "command": "python -m benchmarks.peers peer",
        "sittings": [[{"name": "ours", "figures": {"decode_tok_s": 1.0}, "disturbed": True},
                      {"name": "peer", "figures": {"decode_tok_s": 2.0}, "disturbed": False}]],
    }  # fmt: skip
    path = tmp_path / "result.json"
    path.write_text(json.dumps(report))
    assert command.main(["--show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown == format_report(report) + "\n"
    assert "| ours : peer | 0.50 |" in shown
    assert "Disturbed by other work on the machine throughout: ours." in shown


def test_a_format_that_the_peer_lacks_is_one_line(capsys):
    assert command.main(["llama_cpp", "--formats", "q9"]) == 2
    assert "llama_cpp has no format q9: one of q4_0, q8_0, bf16" in capsys.readouterr().err


def test_what_was_made_is_made_again_only_for_another_key(tmp_path):
    target, made = tmp_path / "thing", []

    def make():
        made.append(1)
        target.write_text("x")

    for key in ("a", "a", "b"):
        make_once(target, key, make)
    assert len(made) == 2
    target.unlink()
    make_once(target, "b", make)
    assert len(made) == 3


def test_a_failed_set_up_names_its_log(tmp_path):
    with pytest.raises(PeerError, match=r"ended with 4: see the end of .*setup\.log"):
        run_logged(
            (sys.executable, "-c", "print('why'); raise SystemExit(4)"), tmp_path / "setup.log"
        )
    assert "why" in (tmp_path / "setup.log").read_text()
