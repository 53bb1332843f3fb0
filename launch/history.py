"""``sundog why ID``: a document's history. ``sundog verify``: whether the stages' files are as recorded."""

import json

from conf.errors import EXIT_DONE, ConfigError, DataError
from data.history import verify, why
from launch.preflight import load_config

SHARE = 0.01  # of the files that verify hashes unless it is told another


def main(name: str, arguments: list[str]) -> int:
    if name == "why":
        if not arguments or "=" in arguments[0]:
            raise ConfigError("ID", " ".join(arguments[:1]), "the id of a document", "sundog why ID data=path ...")
        print(json.dumps(why(load_config(arguments[1:]), arguments[0]), indent=2, ensure_ascii=False))
        return EXIT_DONE
    share = SHARE
    if arguments and "=" not in arguments[0]:
        try:
            share = float(arguments[0])
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise ConfigError("SHARE", arguments[0], "a share of the files, above 0 and up to 1", "sundog verify 0.1")
        arguments = arguments[1:]
    found = verify(load_config(arguments), share)
    for folder, (files, hashed, wrong) in found.items():
        print(f"{folder:<24} {hashed:>7,} of {files:>7,} files hashed, {len(wrong)} wrong")
    if broken := [f"{folder}/{file}" for folder, (_, _, wrong) in found.items() for file in wrong]:
        rule, fix = "files are as their manifests recorded them", "remove them and run the stage again"
        raise DataError("data.dir", ", ".join(broken[:5]), rule, fix)
    return EXIT_DONE
