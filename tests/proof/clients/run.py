"""Run one client's six features against a server; a JSON line for each: the feature, and what went wrong or null.

python run.py CLIENT URL MODEL    in an environment that has the client
"""

import importlib
import json
import sys
import traceback

FEATURES = ("chat", "streams", "tools", "structured_output", "reasoning", "errors")


def main(name: str, url: str, model: str) -> None:
    client = importlib.import_module(f"with_{name}").Client(url, model)
    for feature in FEATURES:
        wrong = None
        try:
            getattr(client, feature)()
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps({"feature": feature, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
