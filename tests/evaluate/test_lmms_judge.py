"""The relay between lmms-eval and the judge: what it puts in, what it counts, whom it answers."""

import json
import socket
import threading
import urllib.error
import urllib.request

import pytest

from judge_server import judge_server
from vaopd.errors import ConfigError
from vaopd.evaluate import lmms_judge
from vaopd.evaluate.lmms_judge import Judge, relay

QUESTION = {"model": "gpt-4", "messages": [{"role": "user", "content": "Is it right?"}], "max_tokens": 16}


def post(url, token, question=QUESTION):
    request = urllib.request.Request(url, json.dumps(question).encode(), {"Authorization": f"Bearer {token}"}, method="POST")
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)["choices"][0]["message"]["content"]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(lmms_judge, "PAUSES", (0, 0, 0))


def test_the_judges_model_and_key_take_the_place_of_the_benchmarks():
    with judge_server() as (url, asked), relay(Judge(url, "judge-8b", "the-key")) as channel:
        assert post(channel.url, channel.token) == "1"  # the full address, which HallusionBench posts to
        assert post(channel.url + "/chat/completions", channel.token) == "1"  # a base address, which OpenAI's client takes
    assert (channel.asked, channel.failures) == (2, [])
    for headers, path, body in asked:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer the-key"
        assert body == QUESTION | {"model": "judge-8b"}
    assert "the-key" not in repr(Judge(url, "judge-8b", "the-key"))


def test_nobody_else_on_the_machine_can_use_the_key():
    with judge_server() as (url, asked), relay(Judge(url, "judge-8b", "the-key")) as channel:
        assert channel.url.startswith("http://127.0.0.1:")
        for token, path in (("guess", ""), (channel.token, "/../models")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(channel.url + path, token)
            assert refused.value.code in (401, 404)
    assert asked == []
    assert channel.asked == 0


@pytest.mark.parametrize(("status", "attempts"), [(500, 4), (429, 4), (401, 1), (302, 1)])
def test_a_failure_is_counted_and_tried_again_where_that_can_help(status, attempts):
    with judge_server(status=status) as (url, asked), relay(Judge(url, "judge-8b")) as channel:
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(channel.url, channel.token)
        assert refused.value.code == 400
    assert len(asked) == attempts
    assert len(channel.failures) == 1
    assert str(status) in channel.failures[0]


def test_an_answer_without_text_is_no_verdict():
    with judge_server(answer=lambda text: "") as (url, _), relay(Judge(url, "thinker")) as channel:
        with pytest.raises(urllib.error.HTTPError):
            post(channel.url, channel.token)
        assert "no text" in channel.failures[0]


def test_options(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-value")
    assert Judge.from_options(None, None) is None
    judge = Judge.from_options("https://judge.example/v1/chat/completions/", "m", "MY_KEY")
    assert judge == Judge("https://judge.example/v1", "m", "secret-value")
    for url, model, says in (
        ("http://127.0.0.1/v1", None, "both"),
        (None, "m", "both"),
        ("judge.example/v1", "m", "no http"),
        ("https://user:pass-word@judge.example/v1", "m", "secret in it"),
        ("http://judge.example:80a/v1", "m", "no http"),
        ("http://[::1/pass-word", "m", "no http"),
        ("http://judge.example/v1 pass-word", "m", "no http"),
    ):
        with pytest.raises(ConfigError, match=says) as error:
            Judge.from_options(url, model)
        assert "pass-word" not in str(error.value)


@pytest.mark.parametrize("status_line", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"])
def test_a_judge_that_breaks_off_is_asked_again_and_counted(status_line):
    """lmms-eval would count a lost answer as a wrong one."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(lmms_judge.ATTEMPTS):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(status_line)

        thread = threading.Thread(target=answer)
        thread.start()
        judge = Judge(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "judge-8b")
        with relay(judge) as channel, pytest.raises(urllib.error.HTTPError) as refused:
            post(channel.url, channel.token)
        thread.join(timeout=20)
    assert refused.value.code == 400
    assert len(channel.failures) == 1
    assert not thread.is_alive()


def test_a_key_with_a_line_end_is_the_key_and_one_with_more_is_refused_unshown(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-value\n")
    judge = Judge.from_options("http://127.0.0.1/v1", "m", "MY_KEY")
    assert judge is not None
    assert judge.key == "secret-value"
    monkeypatch.setenv("MY_KEY", "secret-value\nX-Header: 1")
    with pytest.raises(ConfigError, match="MY_KEY has signs") as error:
        Judge.from_options("http://127.0.0.1/v1", "m", "MY_KEY")
    assert "secret-value" not in str(error.value)
