"""A tenant's program in a Pod of its own: sends requests to the engines by their Service's name, with its ServiceAccount's token.

Run in the Pod with `exec`, with how many to send at once, how many a second, how many at least, and whether to go on until there
is the file STOP (1) or not (0): prints one JSON object, answers by what came of them.
"""

import itertools
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

URL = "http://evenhand-engine.inference:8000/v1/chat/completions"
TOKEN = "/var/run/evenhand/token"
STOP = "/tmp/stop"


def ask(timeout: float = 60) -> str:
    """`ok`, the code of a refusal, or what else went wrong with one small request on a connection of its own."""
    with open(TOKEN) as file:
        token = file.read()
    body = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 2, "temperature": 0}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(URL, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return "ok" if json.load(response)["choices"] else "empty"
    except urllib.error.HTTPError as refused:
        return str(json.load(refused)["error"]["code"])
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def load(at_once: int, per_second: float, at_least: int, goes_on: bool) -> Counter[str]:
    """What came of requests from a few threads, no more often than so many a second."""
    outcomes: Counter[str] = Counter()
    lock, began = threading.Lock(), time.monotonic()

    def is_wanted(number: int) -> bool:
        return number < at_least or (goes_on and not os.path.exists(STOP))

    numbers = itertools.takewhile(is_wanted, itertools.count())

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            time.sleep(max(0.0, began + number / per_second - time.monotonic()))
            outcome = ask()
            with lock:
                outcomes[outcome] += 1

    threads = [threading.Thread(target=work) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


if __name__ == "__main__":
    at_once, per_second, at_least, goes_on = sys.argv[1:]
    print(json.dumps(load(int(at_once), float(per_second), int(at_least), goes_on == "1")))  # noqa: T201
