"""Masking of personal data: addresses of mail, public addresses of the Internet protocol, telephone numbers."""

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from conf.curate import CurationConfig
from data.annotators import Annotator, Documents
from data.steps.kind import EDIT, Verdicts

REASONS: tuple[str, ...] = ()
EDITS = "pii_edits"
ATOM, LABEL = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+", r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
EMAIL = re.compile(rf"\b{ATOM}(?:\.{ATOM})*@(?:{LABEL}\.)+{LABEL}\b")  # RFC 5322 dot-atom and host name
OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
IP = re.compile(rf"(?<![\w.])(?:{OCTET}\.){{3}}{OCTET}(?![\w.]*\d)")
PHONE = re.compile(r"(?<![\w+])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,11}(?!\w)")  # E.164, grouped
MASKS = {"emails": "email@example.com", "ips": "192.0.2.1", "phones": "+10000000000"}  # reserved for examples


@dataclass(frozen=True)
class Pii(Annotator):
    """The edits that mask what is found."""

    emails: bool
    ips: bool
    phones: bool
    NAME: ClassVar[str] = "pii"
    VERSION: ClassVar[int] = 1
    SCHEMA: ClassVar[pa.Schema] = pa.schema([(EDITS, pa.list_(EDIT))])

    def columns(self, documents: Documents) -> dict[str, Any]:
        return {EDITS: [list(self.find(text)) for text in documents.texts]}

    def find(self, text: str) -> Iterator[dict[str, Any]]:
        """The edits of one text."""
        spans: list[tuple[str, re.Match[str]]] = []
        if self.emails and "@" in text:
            spans += [("emails", found) for found in EMAIL.finditer(text)]
        if self.ips:
            spans += [("ips", found) for found in IP.finditer(text) if ipaddress.ip_address(found.group()).is_global]
        if self.phones and "+" in text:
            spans += [("phones", found) for found in PHONE.finditer(text)]
        for kind, found in spans:
            yield {"start": found.start(), "end": found.end(), "text": MASKS[kind]}


def annotator(config: CurationConfig) -> Annotator | None:
    pii = config.pii
    return Pii(pii.emails, pii.ips, pii.phones) if pii.enabled else None


def reasons(columns: pa.Table, config: CurationConfig) -> Verdicts:
    del columns, config  # nothing is dropped
    yield from ()
