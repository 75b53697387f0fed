"""Remake the pictures in docs/: `python -m scripts.remake_pictures`. No rank.

docs/chat.png: the chat page with answers of the demo model, which is served for it on one CPU rank.
Needs Chromium and its driver (`apt-get install chromium chromium-driver`), and a machine that is
idle: the page shows how fast the answers came.
docs/peers.svg: our server beside others, from what was measured (docs/measured/).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.peers.__main__ import main as compare_peers
from benchmarks.peers.processes import set_session_nice
from tests.api.browser import Browser, find_missing
from tests.live.launch import Launch

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, HEIGHT = 860, 660
QUESTIONS = ("What is AI?", "Define dog.")
FEET = "[...document.querySelectorAll('.message.assistant .foot')]"
NUM_ANSWERED = f"{FEET}.filter(foot => foot.innerText.includes('tokens/s')).length"


def photograph_chat(path: Path, nice: int) -> None:
    """Serve the demo model, ask, and save what the window shows."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--model", "demo_model", "--low-bit", "bf16", "--kv-cache-memory", "64MiB")
        server = Launch([sys.executable], Path(folder) / "log", *flags)
        try:
            for process in (server.process.pid, os.getpid()) if nice else ():
                os.setpriority(os.PRIO_PROCESS, process, nice)
                set_session_nice(process, nice)
            server.wait_ready()
            window = Browser(Path(folder) / "profile", server.url)
            try:
                window.resize(WIDTH, HEIGHT)
                window.prefer("light")
                window.open()
                for number, question in enumerate(QUESTIONS):
                    window.type(question, "#input")
                    window.press("enter")
                    window.wait(f"{NUM_ANSWERED} === {number + 1}", 30.0)
                window.wait("document.body.innerText.includes('queue empty')")
                window.screenshot(path)
            finally:
                window.close()
        finally:
            server.clean_up()


def main() -> int:
    """Remake both."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.remake_pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--nice",
        type=int,
        default=0,
        metavar="N",
        help="priority of server and browser: -20, as root, on a machine that is shared (0)",
    )
    args = parser.parse_args()
    measured = sorted(map(str, (DOCS / "measured").glob("*.json")))
    if code := compare_peers(["--show", *measured, "--plot", str(DOCS / "peers.svg")]):
        return code
    if missing := find_missing():
        print(f"docs/chat.png stays as it is: {missing}", file=sys.stderr)
        return 2
    photograph_chat(DOCS / "chat.png", args.nice)
    return 0


if __name__ == "__main__":
    sys.exit(main())
