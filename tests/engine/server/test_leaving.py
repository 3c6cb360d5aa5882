"""A client that leaves is one line in the log, whatever it leaves in the middle of."""

import json
import time

import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import RequestOutput

from .conftest import Say, Serve, connect
from .scripted_core import WAIT_SECONDS
from .test_faults import post


@pytest.mark.parametrize("when", ["its body is read", "it waits", "it is answered"])
def test_a_client_that_leaves_is_one_line_in_the_log(serve: Serve, caplog: pytest.LogCaptureFixture, when: str) -> None:
    caplog.set_level("DEBUG", "evenhand.access")
    server = serve()
    with connect(server) as connection:
        body = json.dumps({"prompt": "x", "stream": True}).encode()
        if when == "its body is read":
            connection.sendall(post("/v1/completions", b"", length=len(body), headers="Expect: 100-continue\r\n"))
            assert b" 100 " in connection.recv(100)
            connection.sendall(body[:-2])
        else:
            connection.sendall(post("/v1/completions", body))
            request_id = server.core.expect(AddRequest).request_id
        if when == "it is answered":
            server.core.output(RequestOutput(request_id=request_id, token_ids=(70,)))
            connection.recv(4096)
    deadline = time.monotonic() + WAIT_SECONDS
    while not (records := [record for record in caplog.records if record.name == "evenhand.access"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    [fields] = (record.fields for record in records if record.fields["path"] == "/v1/completions")
    assert (fields["status"], records[0].levelname) == (499, "INFO")
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_clients_that_leave_before_their_answer_are_no_errors(
    serve: Serve, say: Say, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it is refused or not: it is written to a connection that has been closed."""
    server = serve(say("So."))
    for body in ({"prompt": "x"}, {"prompt": []}, {"prompt": "x", "stream": True}):
        for _ in range(30):
            with connect(server) as connection:
                connection.sendall(post("/v1/completions", json.dumps(body).encode()))
    assert server.client().models.list().data
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
