"""Turns of a conversation as chat templates take them: many insist on one system message, first, and on turns that alternate."""

from collections.abc import Sequence

type Fields = dict[str, object]

_SYSTEM = ("system", "developer")


def merged(messages: Sequence[Fields]) -> list[Fields]:
    """Return messages with the system's at the beginning as one, and the user's that follow each other as one."""
    found: list[Fields] = []
    for message in messages:
        last = found[-1] if found else {}
        both = {str(last.get("role")), str(message["role"])}
        if both <= {*_SYSTEM} and len(found) == 1:
            found[-1] = {"role": "system", "content": f"{last['content']}\n\n{message['content']}"}
        elif both == {"user"}:
            found[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            found.append(message)
    return found
