"""hf-llama-chat: the terminal, alone and in a real one; bad input is one message and exit code 2."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_models import asked, hear_ctrl_c, made
from random_models import tiny_config

from finetune.chat import main
from finetune.decoding import Sampling
from finetune.template import Turn

ROOT = Path(__file__).parent.parent


def only_message(error):
    """The one line of an error; the bar of loading, which other tests' imports leave on, is not one."""
    (line,) = [line for line in error.splitlines() if line and "Loading weights" not in line]
    return line


def lines(monkeypatch, text):
    """What the terminal reads, as from a pipe."""
    remaining = iter(text.splitlines())

    def read(_=""):
        try:
            return next(remaining)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def terminal(monkeypatch, model, text, *arguments):
    lines(monkeypatch, text)
    return main([str(model), "--terminal", "--dtype", "float32", "--max-new-tokens", "12", *map(str, arguments)])


def test_the_terminal_answers_as_the_assistant_does(instructed, adapter, assistants, monkeypatch, capsys):
    assistant = assistants(instructed, "--adapter", adapter)
    turn = Turn("hello\nbeen", "naïve", "")
    answers = [assistant.ask((turn,), sampling=Sampling(max_new_tokens=7), with_adapter=side) for side in (True, False)]
    made(assistant, *answers)
    text = "/compare\n/set max_new_tokens 7\n/input naïve\nhello\\\nbeen\n/quit\nnever read\n"
    assert terminal(monkeypatch, instructed, text, "--adapter", adapter) == 0
    shown = capsys.readouterr().out
    cut = " [cut off at max_new_tokens or at the end of the context]"
    expected = f"with the adapter:\n{answers[0].text}{cut}\nthe base alone:\n{answers[1].text}{cut}\n"
    assert shown.endswith(expected)


def test_the_terminal_holds_a_conversation(chatty, assistants, monkeypatch, capsys):
    assistant = assistants(chatty)
    settings = Sampling(max_new_tokens=12)
    turns = ()
    for text in ("hello", "been"):
        answer = assistant.ask((*turns, Turn(text, "", "")), system="Be brief.", sampling=settings)
        made(assistant, answer)
        turns = (*turns, Turn(text, "", answer.text))
    alone = asked(assistant, "been", settings)
    made(assistant, alone)
    text = "/system Be brief.\nhello\nbeen\n/clear\n/system\nbeen\n"
    assert terminal(monkeypatch, chatty, text) == 0
    shown = capsys.readouterr().out.split(" [cut off at max_new_tokens or at the end of the context]\n")
    assert shown == [*(turn.response for turn in turns), alone.text, ""]
    assert alone.text != turns[1].response


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n", "the instruction is empty"),
        ("/nothing", "there is no command /nothing: /help shows them"),
        ("/compare", "there is no adapter to compare with"),
        ("/system Be brief.", "no place for a system prompt"),
        ("/set heat 3", "there is no setting heat: one of max_new_tokens"),
        ("/set temperature hot", "temperature must be a number, got 'hot'"),
        ("/set top_p 7", "top_p=7 is out of range"),
        ("hello " * 70000, "characters, at most"),
    ],
)
def test_what_the_terminal_cannot_do_is_one_message(instructed, monkeypatch, capsys, text, said):
    assert terminal(monkeypatch, instructed, text) == 2
    error = capsys.readouterr().err
    assert only_message(error).startswith("error: ")
    assert said in only_message(error)


def test_ctrl_c_ends_an_answer_and_not_the_terminal(instructed):
    """In a terminal of its own: an answer that would take minutes, stopped; the settings; Ctrl-D."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "finetune.chat", str(instructed), "--terminal", "--max-new-tokens", "30000"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=hear_ctrl_c
    )
    os.close(theirs)
    shown = ""

    def until(text):
        nonlocal shown
        deadline = time.monotonic() + 120
        while text not in shown:
            assert time.monotonic() < deadline, shown
            shown += os.read(ours, 65536).decode(errors="replace")
        shown = shown.partition(text)[2]

    until("> ")
    os.write(ours, b"hello\n")
    until("hello")
    while len(shown) < 300:
        shown += os.read(ours, 65536).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    until("[stopped]")
    until("> ")
    os.write(ours, b"/set seed 3\n")
    until("seed                3")
    until("> ")
    os.write(ours, b"\x04")
    assert process.wait(60) == 0
    os.close(ours)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--at-once", "0"), "--at-once must be 1 to 64, got 0"),
        (("--temperature", "-1"), "temperature=-1.0 is out of range"),
        (("--adapter", "nowhere"), "nowhere is no adapter: it has no adapter_config.json"),
        (("--template", "nowhere"), "there is no template nowhere"),
        (("--mode", "chat"), "has no chat template: ask by --mode instruction, or name a --template"),
        (("--port", "70000"), "--port must be 0 to 65535, got 70000"),
        (("--host", "203.0.113.1"), "--host 203.0.113.1 is no address of this machine"),
    ],
)
def test_bad_options_are_one_message_and_exit_code_2(instructed, capsys, arguments, said):
    way = () if arguments[0] in ("--port", "--host") else ("--terminal",)
    assert main([str(instructed), *way, *arguments]) == 2
    error = capsys.readouterr().err
    assert only_message(error).startswith("error: ")
    assert said in only_message(error)


@pytest.mark.parametrize("way", [("--terminal",), ("--port", "0")])
def test_no_model_is_one_message(capsys, way):
    assert main(["nowhere", *way]) == 2
    assert "error: there is no folder nowhere: name one that hf-llama-convert" in capsys.readouterr().err


def test_a_port_in_use_is_said_before_the_model_is_loaded(instructed, capsys, monkeypatch):
    monkeypatch.setattr("finetune.chat_page.make_assistant", lambda _: pytest.fail("the model was loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main([str(instructed), "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"error: port {port} of 127.0.0.1 is in use: name another by --port, or 0 for any that is free\n"
    )


def test_without_gradio_the_page_says_what_to_install_and_the_terminal_works(instructed):
    """In processes in which neither gradio nor what it brings can be imported."""
    missing = "sys.modules |= {'gradio': None, 'starlette': None}"
    blocked = f"import sys; {missing}; from finetune.chat import main; sys.exit(main(sys.argv[1:]))"

    def run(*arguments, text=""):
        command = [sys.executable, "-c", blocked, str(instructed), *arguments]
        return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=120)

    page = run()
    assert page.returncode == 2
    assert page.stderr.startswith("error: the page needs gradio (")
    assert "pip install 'hf-llama-repro[chat]'" in page.stderr
    assert page.stderr.count("\n") == 1
    in_terminal = run("--terminal", "--max-new-tokens", "5", text="hello\n")
    assert in_terminal.returncode == 0
    assert len(in_terminal.stdout) > 5


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(instructed, tmp_path, capsys):
    """A folder without weights, whose config.json is of a model of 40 TB."""
    folder = tmp_path / "large"
    folder.mkdir()
    for file in instructed.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = tiny_config(
        vocab_size=512, hidden_size=65536, intermediate_size=500000, num_hidden_layers=80, head_dim=128
    )
    config.save_pretrained(folder)
    assert main([str(folder), "--terminal"]) == 2
    error = capsys.readouterr().err
    assert "does not fit: its weights take" in only_message(error)
    assert "--quantization int8 or nf4" in only_message(error)
