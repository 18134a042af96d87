from typing import Any

from kvd.admin.sessions import render
from kvd.admin.style import Style


def session(id: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": id,
        "name": f"w{id}",
        "role": "worker",
        "pid": 800 + id,
        "uid": 7,
        "pool": "default",
        "age_s": 61.0,
        "state": "live",
        "ended_s_ago": None,
        "process": "living",
        "held_pages": 1200,
        "writing_pages": 3,
        "leased_pages": 2,
        "running_requests": 0,
        "waiting_requests": 0,
    } | fields


def test_one_line_a_session_in_the_order_of_their_ids() -> None:
    reply = {
        "sessions": [
            session(12, name="kvdctl", role="admin", pool=None, held_pages=0, writing_pages=0),
            session(
                3, state="quarantined", ended_s_ago=9.0, running_requests=1, waiting_requests=1
            ),
        ]
    }
    assert render(reply, Style()) == (
        "ID  NAME    ROLE    POOL     PID  UID  AGE    STATE                             HELD  "
        "WRITING  LEASED  RUNNING  WAITING\n"
        "3   w3      worker  default  803  7    1m 1s  quarantined 9.0s, process lives  1,200  "
        "      3       2        1        1\n"
        "12  kvdctl  admin   -        812  7    1m 1s  live                                 0  "
        "      0       2        0        0"
    )


def test_a_name_cannot_steer_the_terminal() -> None:
    text = render({"sessions": [session(1, name="\x1b[2J\nw")]}, Style())
    assert "?[2J?w" in text and text.count("\n") == 1


def test_nobody_is_a_head_alone() -> None:
    assert render({"sessions": []}, Style()).startswith("ID  NAME")
