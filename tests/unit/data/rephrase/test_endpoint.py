"""The client of a chat server: slots, retries, what ends a run, and that nothing is lost or sent twice."""

import time
from typing import Any

import pytest

from conf.errors import ConfigError, ResourceError
from data.rephrase.endpoint import Limits, Request, Tally, answer_all, refusal
from data.rephrase.store import Answer
from tests.helpers.chat_server import Served, chat_server


def requests(count: int) -> list[Request]:
    return [
        Request(f"{i:04x}", {"model": "m", "messages": [{"role": "user", "content": f"text {i}"}]})
        for i in range(count)
    ]


def ask(served: Served, count: int = 6, **limits: Any) -> tuple[dict[str, Answer], Any]:
    usual = {"slots": 4, "retries": 3, "retry_sec": 0.0, "timeout_sec": 20.0}
    found: dict[str, Answer] = {}
    tally = answer_all(iter(requests(count)), Limits(served.url, **{**usual, **limits}), found.update)
    return found, tally


def test_every_request_is_answered_once_and_carries_its_token() -> None:
    with chat_server() as served:
        found, tally = ask(served, 40, token="secret")
    assert len(found) == tally.answered == tally.sent == 40
    assert set(served.answered.values()) == {1}
    assert served.tokens == {"Bearer secret"}
    assert found["0003"]["text"].startswith("<rewrite>\n3 text")
    assert found["0003"]["tokens"] > 0


def test_slots_are_all_used_and_no_more() -> None:
    with chat_server(meet=8) as served:  # nothing is answered before eight requests are there
        found, _ = ask(served, 64, slots=8)
    assert len(found) == 64
    assert served.most == 8


def test_a_slot_waits_until_its_answer_is_kept() -> None:
    found: dict[str, Answer] = {}
    with chat_server() as served:

        def put(answers: dict[str, Answer]) -> None:
            time.sleep(0.02)  # a slow disk
            found.update(answers)
            late.append(len(served.attempts) - len(found))

        late: list[int] = []
        answer_all(iter(requests(40)), Limits(served.url, 4, 0, 0.0, 20.0), put)
    assert len(found) == 40
    assert max(late) <= 4


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (500, "status_500"),
        (503, "status_503"),
        (429, "status_429"),
        (408, "status_408"),
        ("drop", "no_connection"),
        ("cut", "cut_answer"),
        ("nonsense", "nonsense"),
        ("no_choices", "nonsense"),
        ("null_text", "nonsense"),
    ],
)
def test_what_may_pass_is_tried_again_and_counted(trouble: str | int, reason: str) -> None:
    with chat_server(lambda attempt, body: trouble if attempt <= 2 else "answer") as served:
        found, tally = ask(served)
    assert len(found) == 6
    assert dict(tally.retried) == {reason: 12}
    assert set(served.attempts.values()) == {3}
    assert set(served.answered.values()) == {1}


def test_a_slow_answer_is_given_up_after_its_time() -> None:
    with chat_server(lambda attempt, body: "slow" if attempt == 1 else "answer") as served:
        found, tally = ask(served, 2, timeout_sec=0.5)
    assert len(found) == 2
    assert dict(tally.retried) == {"timeout": 2}


def test_retries_are_bounded_and_the_rest_goes_on() -> None:
    def behave(attempt: int, body: dict[str, Any]) -> str | int:
        return 500 if body["messages"][0]["content"] == "text 2" else "answer"

    with chat_server(behave) as served:
        found, tally = ask(served, 10)
    assert set(found) == {f"{i:04x}" for i in range(10)} - {"0002"}
    assert dict(tally.given_up) == {"status_500": 1}
    assert served.attempts["0002"] == 4


def test_a_refused_request_is_an_answer_of_its_own_kind() -> None:
    with chat_server(lambda attempt, body: 400) as served:
        found, tally = ask(served)
    assert {answer["error"] for answer in found.values()} == {"prompt_too_long"}
    assert (tally.refused, tally.answered) == (6, 0)
    assert set(served.attempts.values()) == {1}


def test_a_server_that_refuses_every_request_ends_the_run_and_nothing_is_kept() -> None:
    with chat_server(lambda attempt, body: 422) as served:
        found: dict[str, Answer] = {}
        limits = Limits(served.url, 4, 3, 0.0, 20.0)
        with pytest.raises(ConfigError, match="422"):
            answer_all(iter(requests(100)), limits, found.update)
    assert found == {}
    assert sum(served.attempts.values()) <= 12  # eight, and what is in flight then


def test_single_refusals_are_kept_beside_answers() -> None:
    def behave(attempt: int, body: dict[str, Any]) -> str | int:
        return 422 if body["messages"][0]["content"] in ("text 0", "text 1", "text 20") else "answer"

    with chat_server(behave) as served:
        found, tally = ask(served, 30)
    assert {name for name, answer in found.items() if answer.get("error") == "refused_422"} == {"0000", "0001", "0014"}
    assert (len(found), tally.answered, tally.refused) == (30, 27, 3)


def test_refusals_are_kept_where_an_earlier_run_was_answered() -> None:
    with chat_server(lambda attempt, body: 422) as served:
        found: dict[str, Answer] = {}
        tally = answer_all(iter(requests(20)), Limits(served.url, 4, 3, 0.0, 20.0), found.update, Tally(earlier=1))
    assert len(found) == tally.refused == 20


def test_a_limit_of_tokens_is_no_prompt_that_is_too_long() -> None:
    assert refusal(400, "max_tokens: 500 is more than this server allows (64)") == "refused_400"
    assert refusal(400, "This model's maximum context length is 4097 tokens") == "prompt_too_long"
    assert refusal(413, "the prompt is too long") == "prompt_too_long"
    assert refusal(418, "context") == "refused_418"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_concerns_all_requests_ends_the_run(status: int) -> None:
    with chat_server(lambda attempt, body: status) as served, pytest.raises(ConfigError, match=str(status)):
        ask(served, 100)
    assert sum(served.attempts.values()) <= 8


def test_a_server_that_is_not_there_ends_the_run_with_a_clear_error() -> None:
    with chat_server() as served:
        pass
    with pytest.raises(ResourceError, match="no_connection"):
        ask(served, 100, retries=1)
