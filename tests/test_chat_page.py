"""The page, used in a real browser: asking, streaming, stopping, comparing, several users, nothing from elsewhere."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import Tab, foreign, open_browser, requested, screenshot, until
from chat_models import hear_ctrl_c

from finetune.chat_page import free_port, launch
from finetune.decoding import Sampling
from finetune.page_guard import LOCAL_NAMES, is_local
from finetune.template import Turn

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def browser():
    driver = open_browser()
    yield driver
    driver.quit()


@pytest.fixture
def pages(assistants):
    """Starts pages by their command line; (assistant, address, page)."""
    started = []

    def start(model, *arguments):
        assistant = assistants(model, *arguments)
        port = free_port(HOST, 0)
        started.append(launch(assistant, host=HOST, port=port))
        return assistant, f"http://{HOST}:{port}", started[-1]

    yield start
    for page in started:
        page.blocks.close(verbose=False)


def expected(assistant, *turns, tokens, side=0):
    """What the assistant answers by itself."""
    answer = assistant.ask(turns, sampling=Sampling(max_new_tokens=tokens), with_adapter=side == 0)
    for _ in assistant.stream(answer):
        pass
    return answer.text


def shown(answer):
    """What the browser makes of an answer: a tab is the spaces up to the next eighth column."""
    return answer.expandtabs().strip()


def grows(read):
    """Whether what `read` gives becomes longer, twice; what it gave."""
    texts = [until(read)]
    while len(texts) < 3:
        texts.append(until(lambda: (text := read()) != texts[-1] and text))
    return texts


def test_instructions(browser, pages, instructed, adapter):
    """Loading, an empty instruction, an answer, both sides, streaming, stopping, clearing."""
    requested(browser)
    assistant, address, _ = pages(instructed, "--adapter", adapter, "--max-new-tokens", 40)
    tab = Tab(browser, address)
    assert not tab.is_enabled("stop")
    assert not browser.find_elements("css selector", "#system textarea")  # alpaca has no place for one
    tab.click("send")
    assert until(tab.message) == "the instruction is empty: write one"

    tab.write("naïve", box="input")
    tab.ask("hello")
    turn = Turn("hello", "naïve", "")
    until(lambda: "40 tokens, cut off at the limit" in tab.message() and tab.is_done())
    assert tab.answer() == expected(assistant, turn, tokens=40)

    tab.click("compare")
    until(lambda: tab.find("#side1").is_displayed())
    tab.click("send")
    until(lambda: "base: 40 tokens" in tab.message() and tab.is_done())
    assert [tab.answer(side) for side in (0, 1)] == [expected(assistant, turn, tokens=40, side=side) for side in (0, 1)]
    assert tab.answer(0) != tab.answer(1)

    tab.find("#settings button").click()
    number = until(lambda: tab.find("#settings input[type=number]"))
    until(number.is_displayed)
    number.clear()
    number.send_keys("30000")
    tab.click("send")
    texts = grows(lambda: tab.answer(1))
    assert texts[2].startswith(texts[0])
    assert not tab.is_enabled("send")
    tab.click("stop")
    until(lambda: tab.message().count("stopped") == 2 and tab.is_done())
    assert assistant.model.num_open == 0
    stopped = tab.answer(0)
    assert len(stopped) >= len(texts[0])
    tab.click("clear")
    until(lambda: not tab.answer(0) and not tab.find("#question textarea").get_attribute("value"))
    assert_only_own(browser, address)
    tab.close()


def test_a_conversation(browser, pages, chatty, adapter):
    """Two turns with a system prompt, the base beside them, clearing."""
    requested(browser)
    assistant, address, _ = pages(chatty, "--adapter", adapter, "--max-new-tokens", 24)
    tab = Tab(browser, address)
    tab.click("send")
    assert until(tab.message) == "the message is empty: write one"
    tab.ask("hello")
    until(lambda: "24 tokens" in tab.message() and tab.is_done())
    first = Turn("hello", "", expected(assistant, Turn("hello", "", ""), tokens=24))
    assert tab.said() == ["hello", shown(first.response)]

    tab.click("compare")
    until(lambda: tab.said(1) == tab.said(0))  # it begins with what was said so far
    tab.ask("been")
    until(lambda: "base: 24 tokens" in tab.message() and tab.is_done())
    for side in (0, 1):
        answer = expected(assistant, first, Turn("been", "", ""), tokens=24, side=side)
        assert tab.said(side) == ["hello", shown(first.response), "been", shown(answer)]
    assert tab.said(0) != tab.said(1)
    tab.ask("a </s> b")
    assert "spells the control token </s>" in until(lambda: "control" in tab.message() and tab.message())
    until(tab.is_done)
    tab.click("clear")
    until(lambda: tab.said(0) == tab.said(1) == [])
    assert_only_own(browser, address)
    tab.close()


def test_one_long_answer_does_not_block_the_page_for_others(browser, pages, instructed):
    """Three tabs; two are asked for answers that take minutes; the third gets its own; one is closed, one stopped."""
    assistant, address, page = pages(instructed, "--max-new-tokens", 20)
    right = expected(assistant, Turn("hello", "", ""), tokens=20)
    tabs = [Tab(browser, address) for _ in range(3)]
    for tab in tabs[:2]:
        tab.find("#settings button").click()
        number = tab.find("#settings input[type=number]")
        until(number.is_displayed)
        number.clear()
        number.send_keys("30000")
        tab.ask("hello")
        grows(tab.answer)
    assert assistant.model.num_open == 2
    start = time.monotonic()
    tabs[2].ask("hello")
    until(lambda: "20 tokens" in tabs[2].message() and tabs[2].is_done())
    assert time.monotonic() - start < 10
    assert tabs[2].answer() == right
    assert assistant.model.num_open == 2
    tabs[0].close()
    until(lambda: assistant.model.num_open == 1)
    grows(tabs[1].answer)
    tabs[1].click("stop")
    until(lambda: "stopped" in tabs[1].message())
    assert assistant.model.num_open == 0
    for tab in tabs[1:]:
        tab.close()
    until(lambda: not any(page.running.values()))


def assert_only_own(browser, address):
    """The page asked this machine only, and the browser complained of nothing."""
    asked = requested(browser)
    assert sum(each.startswith(address) for each in asked) > 10
    assert foreign(asked, address) == []


def test_what_a_page_asks_of_others_is_seen_and_refused(browser, pages, instructed):
    """Negative control: without the policy the browser would try, and with it the browser refuses."""
    _, address, _ = pages(instructed)
    elsewhere = "http://203.0.113.1/pixel.png"
    asks = f"const image = new Image(); image.src = '{elsewhere}'; document.body.append(image); return 1"
    browser.switch_to.new_window("tab")
    requested(browser)
    browser.get("data:text/html,<body></body>")
    browser.execute_script(asks)
    until(lambda: elsewhere in foreign(requested(browser), address))
    browser.close()
    browser.switch_to.window(browser.window_handles[0])
    tab = Tab(browser, address)
    browser.get_log("browser")
    browser.execute_script(asks)
    until(lambda: any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser")))
    tab.close()


def test_the_guard(pages, instructed):
    """Other names, large requests and files are refused; the limit on letters is that of the assistant."""
    assistant, address, _ = pages(instructed)
    port = int(address.rpartition(":")[2])

    def status(method="GET", path="/", host=f"{HOST}:{port}", **headers):
        connection = http.client.HTTPConnection(HOST, port, timeout=30)
        connection.request(method, path, headers={"Host": host, **{k.replace("_", "-"): v for k, v in headers.items()}})
        answer = connection.getresponse()
        policy = answer.headers.get("content-security-policy", "")
        connection.close()
        return answer.status, "default-src 'self'" in policy

    assert status() == (200, True)
    assert status(host=f"localhost:{port}") == (200, True)
    assert status(host="evil.example")[0] == 400
    assert status("POST", "/gradio_api/upload", content_length="0")[0] == 403
    assert status("POST", "/gradio_api/queue/join", transfer_encoding="chunked")[0] == 411
    assert status("POST", "/gradio_api/queue/join", content_length=str(20 * assistant.most_letters))[0] == 413


def test_local_addresses():
    assert all(is_local(name.strip("[]")) for name in LOCAL_NAMES)
    assert is_local("127.8.8.8")
    assert not any(is_local(name) for name in ("0.0.0.0", "::", "192.168.1.2", "example.com"))


WATCHED = """
import sys
def watch(event, arguments):
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "127.0.0.1", "localhost", b"127.0.0.1"):
        print("LOOKS UP", arguments[0], flush=True)
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        print("CONNECTS TO", arguments[1], flush=True)
sys.addaudithook(watch)
if sys.argv[1] == "control":
    import socket
    try:
        socket.create_connection(("203.0.113.1", 9), timeout=0.01)
    except OSError:
        pass
    sys.exit()
from finetune.chat import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_serves_on_this_machine_only_asks_nobody_and_ends_by_ctrl_c(instructed):
    command = [sys.executable, "-c", WATCHED, str(instructed), "--port", "0"]
    environment = {**os.environ, "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        preexec_fn=hear_ctrl_c,
    )
    line = process.stdout.readline()
    port = int(re.fullmatch(r"instructed answers at http://127\.0\.0\.1:(\d+) \(Ctrl-C ends it\)\n", line)[1])
    listening = {(ip, at) for ip, at in listeners(process.pid) if at == port}
    assert listening == {(HOST, port)}
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    connection.request("GET", "/config")
    config = json.loads(connection.getresponse().read())
    connection.close()
    assert "instructed" in config["title"]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("ended\n", 0)


def test_a_connection_to_elsewhere_would_be_seen():
    """Negative control of the test above."""
    shown = subprocess.run([sys.executable, "-c", WATCHED, "control"], cwd=ROOT, capture_output=True, text=True)
    assert "CONNECTS TO ('203.0.113.1', 9)" in shown.stdout


def listeners(pid):
    """(address, port) of the IPv4 and IPv6 sockets on which the process listens."""
    import psutil

    found = psutil.Process(pid).net_connections(kind="tcp")
    return {(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN}


@pytest.mark.slow
def test_screenshot(browser, pages, smollm2_gguf, tmp_path):
    """SmolLM2-135M-Instruct in a conversation: docs/chat.png."""
    from conversion.convert import main as convert

    folder = tmp_path / "SmolLM2-135M-Instruct"
    assert convert([str(smollm2_gguf), str(folder)]) == 0
    _, address, _ = pages(folder, "--max-new-tokens", 160, "--temperature", 0)
    tab = Tab(browser, address)
    for question in ("What is the capital of France?", "Name three things that one can see there."):
        tab.ask(question)
        until(lambda: "complete" in tab.message() and tab.is_done(), 120)
        until(lambda: (tab.write(""), True)[1])
    assert "Paris" in tab.said()[1]
    screenshot(tab, ROOT / "docs" / "chat.png")
    tab.close()
