"""The harness that runs other servers beside ours, against small servers of its own."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers.checkpoint import fill_vocabulary
from benchmarks.peers.environments import INSIDE, PeerError, make_once, run_logged
from benchmarks.peers.ours import CACHE_TOKENS, count_cache_bytes, launch_ours
from benchmarks.peers.processes import Launch, Server, list_session, read_pss
from benchmarks.peers.results import Row, medians, merge_reports
from benchmarks.peers.table import format_rows
from benchmarks.peers.work import Measurement, Task, measure, take_turns

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
        take_turns([small_server, other], {"short": 2}, {})
    assert [entry for entry in order if entry[1] == "short"] == [
        ("small", "short", 0), ("other", "short", 0), ("small", "short", 1), ("other", "short", 1),
    ]  # fmt: skip


# Burns a core in each of two processes.
SPINNER = """
import os, sys, time
os.fork()
while True: pass
"""


def test_nobody_but_the_server_whose_turn_it_is_takes_the_cores(small_server, tmp_path):
    launch = Launch("spinner", (sys.executable, "-c", SPINNER))
    with Server(launch, tmp_path / "spinner.log") as spinner:
        wait_for(lambda: len(spinner.processes()) == 2)
        spinner.pause()
        start = spinner.cpu_seconds()
        with small_server.turn():
            measure(small_server, Task("one", 1, 4, 8, lambda summary: {}), seed=0)
        assert spinner.cpu_seconds() == start
        with spinner.turn():
            wait_for(lambda: spinner.cpu_seconds() > start)
        wait_for(lambda: {state(process) for process in spinner.processes()} == {"T"})
        processes = spinner.processes()
    wait_for(lambda: not any(os.path.exists(f"/proc/{one}/exe") for one in processes))


def state(process):
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_answers_after_it_was_stopped(small_server):
    task = Task("one", 1, 4, 8, lambda summary: {})
    small_server.pause()
    with small_server.turn():
        measure(small_server, task, seed=0)
    small_server.resume()
    measure(small_server, task, seed=0)


def test_disturbed_rounds_count_only_when_there_are_no_others():
    def one(value, others):
        return {"speed": value, "others": others}

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
    lines = format_rows(rows)
    assert lines[0] == "| server | decode, tok/s | PSS, MiB |"
    assert lines[-1] == "| ours : peer | **1.50** | 0.80 |"


def make_report(date: str, ours: list, peer: list, commit: str = "ours at abc") -> dict:
    """As one run leaves it; figures of the short task, with what others used."""
    rows = [
        {"name": name, "memory_mib": 9.0, "command": [],
         "rounds": {"short": [{"decode_tok_s": speed, "others": others} for speed, others in part]}}
        for name, part in (("ours", ours), ("peer", peer))
    ]  # fmt: skip
    return {
        "machine": "a machine", "date": date, "ours": commit, "shape": "tiny",
        "versions": {"peer": "1"}, "command": f"command {date}", "sittings": [rows],
    }  # fmt: skip


def test_results_can_be_shown_again(tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(make_report("day 1", [(1.0, 0.3)], [(2.0, 0.0)])))
    assert command.main(["--show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "a machine; day 1; ours at abc; peer 1." in shown
    assert "| ours : peer | 0.50 | **1.00** |" in shown
    assert "Disturbed by other work on the machine throughout: ours (short)." in shown


def test_sittings_of_the_same_versions_become_one_table():
    first = make_report("day 1", [(1.0, 0.3)], [(2.0, 0.0)])
    second = make_report("day 2", [(4.0, 0.0), (6.0, 0.0)], [(4.0, 0.0)])
    (table,) = merge_reports([first, second])
    assert [(row.name, row.figures["decode_tok_s"], row.disturbed) for row in table.rows] == [
        ("ours", 5.0, []), ("peer", 3.0, []),
    ]  # fmt: skip
    assert table.dates == ["day 1", "day 2"]
    assert table.commands == ["command day 1", "command day 2"]
    newer = make_report("day 3", [(9.0, 0.0)], [(4.0, 0.0)], commit="ours at def")
    assert len(merge_reports([first, newer])) == 2


BARS = ".//{{http://www.w3.org/2000/svg}}rect[@class='{}']"


def test_the_picture_has_a_bar_for_each_figure(tmp_path, capsys):
    result, picture = tmp_path / "result.json", tmp_path / "picture.svg"
    result.write_text(json.dumps(make_report("day 1", [(20.0, 0.0)], [(5.0, 0.0)])))
    assert command.main(["--show", str(result), "--plot", str(picture)]) == 0
    drawn = ElementTree.fromstring(picture.read_text())
    widths = {
        kind: [float(bar.get("width")) for bar in drawn.findall(BARS.format(kind))]
        for kind in ("ours", "peer")
    }
    decode, memory = zip(widths["ours"], widths["peer"], strict=True)
    assert decode[0] == pytest.approx(4 * decode[1], rel=0.01)
    assert memory[0] == memory[1]
    assert {"ours", "peer", "20.0", "5.0"} <= {text.text for text in drawn.iter() if text.text}


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["benchmarks.peers.work"], "measure", interrupt_after(6))
    monkeypatch.setattr(command, "HOME", tmp_path)
    sittings: list = []
    with pytest.raises(KeyboardInterrupt):
        command.run_sitting([small_launch("ours"), small_launch("peer")], {"short": 5}, 0, sittings)
    assert [[row["name"], row["rounds"]["short"]] for row in sittings[0]] == [
        ["ours", [{"decode_tok_s": 1.0, "others": 0.0}]], ["peer", []],
    ]  # fmt: skip
    assert [row["command"][:2] for row in sittings[0]] == 2 * [[Path(sys.executable).name, "-c"]]
    report = make_report("day", [], []) | {"sittings": sittings}
    (table,) = merge_reports([report])
    assert table.rows[0].figures["decode_tok_s"] == 1.0


def interrupt_after(count):
    """Stands for `measure`: Ctrl-C comes after so many calls."""
    calls = iter(range(count))

    def measure(server, task, seed):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return Measurement({"decode_tok_s": 1.0}, 0.0)

    return measure


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
