"""The chat page: its policy anywhere, its journey in a real Chromium where there is one."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator

import httpx
import pytest

from autotp_serving.api.chat_page import PAGES, STATIC, content_policy
from tests.api.browser import Browser, find_missing
from tests.api.conftest import LiveServer
from tests.api.service import client

needs_browser = pytest.mark.skipif(find_missing() is not None, reason=str(find_missing()))


def last(role: str) -> str:
    """The latest message's text, as an expression of the page's."""
    return f"([...document.querySelectorAll('.message.{role} .text')].at(-1)?.innerText ?? '')"


RUNNING = "!document.querySelector('#stop').hidden"
IDLE = "document.querySelector('#stop').hidden"


@pytest.mark.parametrize("path", PAGES)
def test_page_is_served_under_a_strict_policy_even_where_a_key_is_wanted(path: str):
    async def go() -> httpx.Response:
        async with client(config={"api_key": ("key",)}) as (http, _):
            assert (await http.head(path)).status_code == 200
            return await http.get(path)

    reply = asyncio.run(go())
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-") and policy["style-src"].startswith(
        "'sha256-"
    )
    assert "unsafe" not in str(policy)


@pytest.mark.parametrize("name", PAGES.values())
def test_page_fetches_nothing_from_elsewhere_and_parses_no_text_as_html(name: str):
    page = (STATIC / name).read_text()
    assert set(re.findall(r"https?://[^\s'\"]+", page)) <= {"http://www.w3.org/2000/svg"}
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in page
    assert page.count("<script") == page.count("<style") == 1
    assert content_policy(page.encode()) != content_policy(page.replace("draw", "dr4w").encode())


@pytest.fixture(scope="module")
def window(live: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One window for all tests of this file."""
    window = Browser(tmp_path_factory.mktemp("profile"), "about:blank")
    yield window
    window.close()


@pytest.fixture
def page(window: Browser, live: LiveServer) -> Iterator[Browser]:
    """The page, as someone sees it who was never here; nothing may be wrong on its console."""
    yield open_page(window, live)
    assert [line["message"] for line in window.log() if line["level"] == "SEVERE"] == []


def open_page(window: Browser, server: LiveServer) -> Browser:
    window.url = server.url.replace("0.0.0.0", "127.0.0.1")
    window.resize(1280, 800)
    window.prefer("light")
    window.open()
    window.run("localStorage.clear()")
    window.open()
    window.log()
    return window


@needs_browser
@pytest.mark.live
def test_routes_are_shown_and_tried_on_a_phone(page: Browser):
    page.resize(360, 640, is_phone=True)
    page.open("/docs")
    page.wait("document.querySelectorAll('details').length > 10")
    generate = "document.getElementById('post/generate/')"
    page.run(f"{generate}.open = true")
    page.wait(f"{generate}.querySelector('table')?.innerText.includes('n_predict')")
    page.run(f"{generate}.querySelector('button').click()")
    page.wait(f"{generate}.querySelector('pre').innerText.includes('branch of computer science')")
    assert page.run("return document.documentElement.scrollWidth") <= 360


@needs_browser
@pytest.mark.live
def test_ask_with_the_keyboard_alone_and_read_the_answer(page: Browser):
    page.wait("document.querySelector('#model-name').innerText === 'letters'")
    assert page.run("return document.activeElement.id") == "input"
    page.type("What is AI?")
    page.press("enter")
    page.wait(f"{last('assistant')} === 'A branch of computer science.' && {IDLE}")
    assert page.run(f"return {last('user')}") == "What is AI?"
    note = page.text(".message.assistant .foot")
    assert re.search(r"30 tokens · [\d.]+ tokens/s · first after \d", note)
    assert page.run("return document.activeElement.id") == "input"
    # It is still there after a reload, and gone with a new chat.
    page.open()
    assert page.run(f"return {last('assistant')}") == "A branch of computer science."
    page.click("#new")
    page.open()
    assert "What would you like to know?" in page.text()


@needs_browser
@pytest.mark.live
def test_a_reload_in_the_middle_of_an_answer_keeps_what_has_come(page: Browser):
    page.type("a long one")
    page.press("enter")
    page.wait(f"{RUNNING} && {last('assistant')}.length > 5")
    page.open()
    assert len(page.run(f"return {last('assistant')}")) > 5
    assert "stopped" in page.text(".message.assistant .foot")
    assert page.run(f"return {IDLE}")


@needs_browser
@pytest.mark.live
def test_shift_enter_makes_a_line_and_the_box_grows(page: Browser):
    height = "document.querySelector('#input').offsetHeight"
    before = page.run(f"return {height}")
    page.type("one")
    page.press("shift", "enter")
    page.type("two")
    assert page.run("return document.querySelector('#input').value") == "one\ntwo"
    assert page.run(f"return {height}") > before + 10


@needs_browser
@pytest.mark.live
@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_on_the_server_and_keeps_the_text(
    page: Browser, live: LiveServer, how: str
):
    page.type("tell me everything")
    page.click("#send")
    page.wait(f"{last('assistant')}.length > 20")
    assert re.search(r"[\d.]+ tokens/s", page.wait("document.querySelector('#figures').innerText"))
    assert live.health()["num_running"] == 1
    if how == "button":
        page.click("#stop")
    else:
        page.press("escape")
    page.wait(IDLE)
    live.wait_for_health(lambda health: health["num_running"] == 0, 2.0)
    assert page.text(".message.assistant .foot").endswith("stopped")
    assert len(page.run(f"return {last('assistant')}")) > 20


@needs_browser
@pytest.mark.live
def test_settings_reach_the_server_and_stay(page: Browser):
    page.click("#open-settings")
    for name, value in {"max_tokens": "5", "seed": "3", "system": "Be brief."}.items():
        page.type(value, f"[name={name}]")
    page.press("enter")
    page.click("#settings .primary")
    page.wait("!document.querySelector('#settings').open")
    page.run("""
        window.sent = [];
        const real = window.fetch;
        window.fetch = (path, options) => {
            if (options?.body) sent.push(options.body);
            return real(path, options);
        };
    """)
    page.type("hello", "#input")
    page.press("enter")
    foot = "document.querySelector('.message.assistant .foot')?.innerText"
    page.wait(f"{foot}?.includes('cut at') && {IDLE}")
    assert page.text(".message.assistant .foot").startswith("Copy\nAnswer again\n5 tokens")
    (body,) = map(json.loads, page.run("return sent"))
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["max_tokens"], body["seed"], body["temperature"]) == (5, 3, 0.7)
    page.open()
    page.click("#open-settings")
    assert page.run("return document.querySelector('[name=seed]').value") == "3"


@needs_browser
@pytest.mark.live
def test_dark_mode_follows_the_system_until_chosen(page: Browser):
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.run(f"return {background}")
    page.prefer("dark")
    page.wait(f"{background} !== '{light}'")
    page.click("#theme")
    page.wait(f"{background} === '{light}'")
    page.open()
    assert page.run(f"return {background}") == light


@needs_browser
@pytest.mark.live
def test_a_phone_shows_everything_without_scrolling_sideways(page: Browser):
    page.resize(360, 640, is_phone=True)
    page.open()
    page.type("What is AI?", "#input")
    page.click("#send")
    page.wait(f"{last('assistant')} === 'A branch of computer science.' && {IDLE}")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    for selector in ("#send", "#new", "#theme", "#open-settings"):
        box = page.run(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [box.left, box.right, box.bottom, box.width, box.height]", selector
        )  # fmt: skip
        assert box[0] >= 0 and box[1] <= 360 and box[2] <= 640, selector
        assert min(box[3:]) >= 40, f"{selector} is too small for a finger"


@needs_browser
@pytest.mark.live
def test_text_of_a_model_is_shown_never_obeyed(page: Browser):
    evil = (
        "<img src=x onerror=\"document.title='owned'\"> **bold** `<b>`\n\n"
        "```\n<script>x</script>\n```\n1. one\n2. two"
    )
    messages = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
    page.run("localStorage.setItem('autotp.conversation', arguments[0])", json.dumps(messages))
    page.open()
    assert (
        page.run("return document.querySelectorAll('#messages img, #messages script, b').length")
        == 0
    )
    assert "onerror" in page.run(f"return {last('assistant')}")
    tags = page.run(
        "return [...document.querySelectorAll('.assistant .text *')].map((n) => n.tagName)"
    )
    assert {"STRONG", "CODE", "PRE", "OL", "LI"} <= set(tags)
    assert page.run("return document.title") == "letters - AutoTP Serving"


@needs_browser
@pytest.mark.live
def test_a_server_with_a_key_asks_for_it_once(
    window: Browser, start_server: Callable[..., LiveServer]
):
    page = open_page(window, start_server(config={"api_key": ["open-sesame"]}))
    page.wait("document.querySelector('#settings').open")
    assert page.run("return document.activeElement.name") == "key"
    page.press("escape")
    page.type("What is AI?", "#input")
    page.press("enter")
    page.wait(
        "document.querySelector('.error strong')?.innerText === 'This server wants an API key'"
    )
    page.click(".error button")
    page.type("open-sesame")
    page.press("enter")
    page.click(".error button:last-child")
    page.wait(f"{last('assistant')} === 'A branch of computer science.' && {IDLE}")
    page.open()
    page.wait("document.querySelector('#model-name').innerText === 'letters'")
    assert not page.run("return document.querySelector('#settings').open")


@needs_browser
@pytest.mark.live
def test_failures_are_told_kindly_and_can_be_tried_again(
    window: Browser, start_server: Callable[..., LiveServer]
):
    server = start_server(
        delay=0.1, max_model_len=64, config={"max_num_seqs": 1, "max_queue_len": 1}
    )
    page = open_page(window, server)
    title = "document.querySelector('.error strong')?.innerText"
    page.type("much too long " * 6, "#input")
    page.press("enter")
    page.wait(f"{title} === 'The conversation has become too long for this model'")
    page.click("#new")
    long = {"prompt": "x", "n_predict": 60, "ignore_eos": True}
    with (
        httpx.stream("POST", f"{server.url}/generate_stream", json=long),
        httpx.stream("POST", f"{server.url}/generate_stream", json=long),
    ):
        page.wait("document.querySelector('#figures').innerText.includes('1 queued')")
        page.type("What is AI?", "#input")
        page.press("enter")
        page.wait(f"{title} === 'The server is busy'")
        assert "There should be room in about" in page.text(".error p")
    # The server sees a client leave at its next write to it: until then the queue is still full.
    page.wait("document.querySelector('#figures').innerText.includes('queue empty')")
    page.click(".error button")
    page.wait(f"{last('assistant')} === 'A branch of computer science.' && {IDLE}")
    server.stop()
    page.type("still there?", "#input")
    page.press("enter")
    page.wait(f"{title} === 'The server cannot be reached'")
    page.wait("document.querySelector('#dot').className === 'dot bad'")
