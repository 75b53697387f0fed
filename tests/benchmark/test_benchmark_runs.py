"""benchmark.py from its command line against made-up servers, well-behaved and not."""

from __future__ import annotations

import ast
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import benchmark
from tests.benchmark.fake_server import FakeServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, capsys):
    """Run against a server; returns exit code, what was printed, and the report."""

    def run_benchmark(server, *arguments):
        arguments = ["--url", server.url, "--output", str(tmp_path), *map(str, arguments)]
        code = benchmark.main(arguments)
        printed = capsys.readouterr()
        file = tmp_path / "benchmark.json"
        return code, printed, json.loads(file.read_text()) if file.exists() else None

    return run_benchmark


def every(nth, fault):
    return lambda number: fault if number % nth == 0 else None


def test_the_documented_command_leaves_its_files(run, tmp_path):
    documented = "--prompt_length 1024 --max_concurrent_requests 1 2 3 --max_new_tokens 128"
    with FakeServer() as server:
        code, printed, report = run(server, *documented.split(), "--num_requests", 6, "--html")
        assert server.most_running == 3
        prompts = [body["prompt"] for body in server.bodies]
        assert {len(server.tokenizer.encode(prompt)) for prompt in prompts} == {1024}
        assert len({prompt[:20] for prompt in prompts}) == len(prompts) == 3 * 6 + 1 + 2 + 3
        assert all(body["n_predict"] == 128 and body["ignore_eos"] for body in server.bodies)
    assert code == 0
    for level in report["levels"]:
        log = (tmp_path / f"{level['concurrency']}.log").read_text()
        assert "6 of 6" in log
        assert "Time to first token" in log
        summary = level["summary"]
        assert summary["output_tokens"] == 6 * 128
        assert summary["input_tokens"] == 6 * 1024
        assert level["server"]["output_tokens"] == 6 * 128
        rate = summary["output_tokens"] / summary["duration_s"]
        assert summary["output_token_throughput"] == pytest.approx(rate)
    assert "Output tokens per second" in printed.out
    assert "FAILED" not in printed.out


def test_the_html_report_is_one_file_that_fetches_nothing(run, tmp_path):
    with FakeServer() as server:
        run(server, "--max_concurrent_requests", 1, 2, "--prompt_length", 32, "--html",
            "--num_requests", 3)  # fmt: skip
    page = (tmp_path / "benchmark.html").read_text()
    assert page.count("<svg") == 9
    assert not re.search(r"(src|href|url\(|@import|<script)", page)
    assert "nan" not in page.lower().replace("nano", "")


@pytest.mark.parametrize("api", ["native", "completions", "chat"])
def test_all_three_apis_measure_the_same_server(run, api):
    with FakeServer(first_delay=0.05, token_delay=0.01) as server:
        code, _, report = run(server, "--api", api, "--prompt_length", 100, "--max_new_tokens", 20,
                              "--num_requests", 4, "--max_concurrent_requests", 2)  # fmt: skip
        if api != "native":
            assert server.bodies[-1]["model"] == "fake"
    assert code == 0
    summary = report["levels"][0]["summary"]
    assert (summary["input_tokens"], summary["output_tokens"]) == (400, 80)
    assert 50 <= summary["ttft_ms"]["p50"] <= 90
    assert 10 <= summary["tpot_ms"]["p50"] <= 15
    assert 10 <= summary["itl_ms"]["p50"] <= 15
    assert 50 + 20 * 10 <= summary["e2e_ms"]["p50"] <= 350


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("http500", "HTTP 500: out of luck"),
        ("hangup", "connection closed before the response"),
        ("cut", "connection closed in mid-response"),
        ("error", "error in the stream: rank 1 died"),
        ("stall", "stalled: nothing arrived for 0.3 s"),
    ],
)
@pytest.mark.parametrize("api", ["native", "chat"])
def test_a_server_that_fails_every_third_request_gets_no_credit_for_it(run, fault, kind, api):
    with FakeServer(fault=every(3, fault)) as server:
        code, printed, report = run(
            server, "--api", api, "--prompt_length", 64, "--max_new_tokens", 16, "--warmup", 0,
            "--num_requests", 12, "--max_concurrent_requests", 2, "--stall_timeout", 0.3,
        )  # fmt: skip
    assert code == 0
    summary = report["levels"][0]["summary"]
    assert (summary["completed"], summary["failed"]) == (8, 4)
    assert summary["failures"] == {kind: 4}
    assert summary["output_tokens"] == 8 * 16
    assert summary["input_tokens"] == 8 * 64
    rate = 8 * 16 / summary["duration_s"]
    assert summary["output_token_throughput"] == pytest.approx(rate)
    assert f"4 x {kind}" in printed.out
    assert "FAILED: 4 of 12" in printed.out
    came = 0 if fault in ("http500", "hangup") else 4 * 8
    assert summary["events_of_failed_requests"] == came
    assert report["levels"][0]["server"]["output_tokens"] == 8 * 16 + came
    if fault == "stall":
        assert summary["duration_s"] > 0.5  # stalls count as time


def test_nothing_completed_is_exit_code_1(run):
    with FakeServer(fault=lambda number: "http500") as server:
        code, printed, report = run(server, "--prompt_length", 32, "--num_requests", 2, "--html")
    assert code == 1
    assert report["levels"][0]["summary"]["output_token_throughput"] == 0
    assert "2 x HTTP 500" in printed.out


def test_goodput(run):
    with FakeServer(first_delay=0.05) as server:
        _, printed, report = run(server, "--prompt_length", 32, "--num_requests", 4,
                                 "--slo", "ttft=20", "itl=500")  # fmt: skip
        assert report["levels"][0]["summary"]["goodput"] == 0
        _, printed, report = run(server, "--prompt_length", 32, "--num_requests", 4,
                                 "--slo", "ttft=500")  # fmt: skip
    assert report["levels"][0]["summary"]["good_requests"] == 4
    assert "Good requests per second" in printed.out


def test_at_a_rate_latency_counts_from_the_due_time(run):
    """A slow server must not slow the clock down: waiting for a free place is latency."""
    with FakeServer(first_delay=0.1) as server:
        _, _, report = run(server, "--prompt_length", 32, "--max_new_tokens", 2, "--warmup", 0,
                           "--num_requests", 8, "--request_rate", 1000)  # fmt: skip
    ttft = report["levels"][0]["summary"]["ttft_ms"]
    assert ttft["max"] >= 790
    with FakeServer() as server:
        _, _, report = run(server, "--prompt_length", 32, "--max_new_tokens", 2, "--warmup", 0,
                           "--num_requests", 20, "--request_rate", 40,
                           "--max_concurrent_requests", 50)  # fmt: skip
    assert 0.2 < report["levels"][0]["summary"]["duration_s"] < 1.5


def test_tokens_are_counted_when_the_server_sends_no_usage(run):
    with FakeServer(sends_usage=False, tokens_per_event=3) as server:
        _, _, report = run(server, "--api", "completions", "--prompt_length", 64,
                           "--max_new_tokens", 20, "--num_requests", 2)  # fmt: skip
    assert report["levels"][0]["summary"]["output_tokens"] == 40


def test_events_of_several_tokens(run):
    with FakeServer(tokens_per_event=4, token_delay=0.02) as server:
        _, _, report = run(server, "--api", "completions", "--prompt_length", 64,
                           "--max_new_tokens", 20, "--num_requests", 2)  # fmt: skip
    summary = report["levels"][0]["summary"]
    assert summary["output_tokens"] == 40
    assert summary["itl_ms"]["p50"] >= 20
    assert summary["tpot_ms"]["p50"] < 10


def test_dataset(run, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "one two"}\n{"prompt": "three", "max_tokens": 5}\n')
    with FakeServer() as server:
        _, _, report = run(server, "--dataset", file, "--max_new_tokens", 10, "--num_requests", 4,
                           "--warmup", 0)  # fmt: skip
        assert [body["n_predict"] for body in server.bodies] == [10, 5, 10, 5]
    assert report["levels"][0]["summary"]["output_tokens"] == 30


def test_a_bad_line_of_a_dataset_is_named(run, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "one two"}\n{"text": "three"}\n')
    with FakeServer() as server:
        code, printed, _ = run(server, "--dataset", file, "--num_requests", 1)
        assert code == 0
        assert "1 of 2 records hold no prompt and are left out" in printed.err
        file.write_text('{"prompt": "one two"}\n\n{"prompt": "thr\n')
        code, printed, _ = run(server, "--dataset", file)
    assert code == 2
    assert "mine.jsonl: line 3: not JSON" in printed.err


def hear_sigint():
    """As a shell at a terminal starts a command, whatever started these tests."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ignore_sigint():
    """As a script starts a command in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("api", ["native", "chat"])
@pytest.mark.parametrize(
    ("start", "signals", "code"),
    [
        (hear_sigint, [signal.SIGINT], 130),
        (hear_sigint, [signal.SIGTERM], 143),
        (ignore_sigint, [signal.SIGINT, signal.SIGTERM], 143),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM where Ctrl-C is ignored"],
)
def test_an_interrupted_run_keeps_what_was_answered(tmp_path, api, start, signals, code):
    words = [sys.executable, "benchmark.py", "--output", tmp_path, "--api", api, "--html"]
    words += ["--prompt_length", 32, "--max_new_tokens", 10, "--num_requests", 900]
    words += ["--max_concurrent_requests", 2, 3]
    with FakeServer(token_delay=0.005) as server:
        process = subprocess.Popen(
            [*map(str, words), "--url", server.url], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=start,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        # Warm-up and requests in flight are not kept: well more than the 15 asserted below.
        while len(server.bodies) < 40:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        for number in signals:
            assert process.poll() is None
            process.send_signal(number)
            time.sleep(0.2)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    (level,) = json.loads((tmp_path / "benchmark.json").read_text())["levels"]
    summary = level["summary"]
    assert (summary["failed"], summary["output_tokens"]) == (0, 10 * summary["completed"])
    assert 15 < summary["completed"] == 900 - level["unfinished"]
    assert "INTERRUPTED" in out and "INTERRUPTED" in (tmp_path / "2.log").read_text()
    assert err.splitlines()[-1] == "benchmark.py: interrupted; 1 of 2 levels are above"
    assert (tmp_path / "benchmark.html").exists()


def test_a_server_that_goes_away_between_levels_costs_only_the_rest(run, tmp_path):
    server = FakeServer()
    server.fault = lambda number: server.has_tokenize and vanish()

    def vanish():
        if len(server.bodies) == 5:
            server.has_tokenize = False

    with server:
        code, printed, report = run(server, "--prompt_length", 32, "--num_requests", 4, "--html",
                                    "--max_concurrent_requests", 1, 2)  # fmt: skip
    assert code == 1
    assert [level["summary"]["completed"] for level in report["levels"]] == [4]
    assert "has gone away (/tokenize answered HTTP 404: /tokenize)" in printed.err
    assert "1 of 2 levels are above" in printed.err
    assert "Output tokens per second" in printed.out
    assert (tmp_path / "benchmark.html").exists()


def test_an_address_may_end_as_openai_clients_write_it(run):
    with FakeServer() as server:

        class Address:
            url = f"{server.url}/v1/"

        code, _, report = run(Address, "--api", "chat", "--prompt_length", 32,
                              "--num_requests", 1)  # fmt: skip
    assert code == 0
    assert report["levels"][0]["summary"]["completed"] == 1


def test_a_wrong_model_is_named_with_the_right_ones(run):
    with FakeServer(has_tokenize=False) as server:
        code, printed, _ = run(server, "--api", "chat", "--model", "fale")
    assert code == 2
    assert printed.err.strip().endswith("; it has no model fale, but fake")


def test_a_certificate_that_nobody_vouches_for(run, tmp_path):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            with suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True):
                pass

        threading.Thread(target=greet, daemon=True).start()

        class Secret:
            url = f"https://127.0.0.1:{listener.getsockname()[1]}"

        code, printed, _ = run(Secret)
    assert code == 2
    assert "self-signed certificate; set SSL_CERT_FILE" in printed.err
    assert len(printed.err.splitlines()) == 1


def test_compare(run, tmp_path, capsys):
    for name, delay in (("before", 0.02), ("after", 0.005)):
        with FakeServer(token_delay=delay) as server:
            run(server, "--prompt_length", 32, "--num_requests", 2, "--max_new_tokens", 8)
        (tmp_path / "benchmark.json").rename(tmp_path / f"{name}.json")
    code = benchmark.main(
        ["--compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert re.search(r"1 concurrent +before +after +change", printed)
    change = re.search(r"Output tokens per second .*\+([\d.]+)%", printed)
    assert 100 < float(change[1]) < 400
    (tmp_path / "x.json").write_text("{}")
    assert benchmark.main(["--compare", *[str(tmp_path / "x.json")] * 2]) == 2


def test_what_cannot_start_is_one_line(run, capsys):
    class Nobody:
        url = "http://127.0.0.1:9"

    code, printed, _ = run(Nobody)
    assert code == 2
    assert "no server at http://127.0.0.1:9" in printed.err
    assert len(printed.err.splitlines()) == 1
    with FakeServer(has_tokenize=False) as server:
        code, printed, _ = run(server)
    assert code == 2
    assert "--tokenizer DIR" in printed.err
    for bad in (["--prompt_length", "0"], ["--slo", "speed=1"], ["--request_rate", "0"]):
        with pytest.raises(SystemExit) as stop:
            benchmark.main(bad)
        assert stop.value.code == 2
        assert bad[0] in capsys.readouterr().err


def test_the_key_is_sent_and_never_written(run, tmp_path):
    with FakeServer() as server:
        run(server, "--api_key", "sk-secret", "--prompt_length", 32, "--num_requests", 1, "--html")
    assert not [path for path in tmp_path.iterdir() if "sk-secret" in path.read_text()]


def test_the_load_client_imports_nothing_of_the_server():
    """Followed from benchmark.py on: other programs in benchmarks/ may measure the package."""
    waiting, seen = [ROOT / "benchmark.py"], set()
    while waiting:
        path = waiting.pop()
        seen.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            assert not [name for name in names if name.startswith("autotp_serving")], path
            for name in names:
                file = ROOT / (name.replace(".", "/") + ".py")
                if name.startswith("benchmarks.") and file.stem not in seen:
                    waiting.append(file)
    assert {"session", "load", "http_client"} <= seen
