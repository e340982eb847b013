"""Cluster state that survives this process: the last whole policy set and the known identities.

`policies.json` is written only after a whole snapshot was received, so what it holds is always a
policy set that was in force as one: an agent that starts without the identity service enforces it.
Without the file, and without the service, nothing is resolved and endpoints keep dropping.
`identities.json` lets workloads with known label sets start while the service is away.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from cilia import statefile
from cilia.identity import NumericIdentity
from cilia.labels import LabelError, Labels
from services.agent.clusterwatch import ClusterView, IdentityEntry, PolicyEntry, PolicyName, Where

_VERSION = 1


def _where(value: Any) -> Where:
    source, line, column = value
    return str(source), int(line), int(column)


class PolicyStateFile:
    """Saves and loads what a ClusterView holds. Blocking: call it from an executor."""

    def __init__(self, directory: Path) -> None:
        self.policies_path = directory / "policies.json"
        self.identities_path = directory / "identities.json"
        self.damaged: list[str] = []  # what was found unreadable, for the status

    def load_into(self, view: ClusterView) -> None:
        """Fill the view from disk. A damaged file is set aside, named, and counts as absent."""
        identities = self._load_identities()
        policies, revision, store_id = self._load_policies()
        view.load(
            policies=policies, policy_revision=revision, identities=identities, store_id=store_id
        )

    def _load_policies(self) -> tuple[list[PolicyEntry] | None, int, int]:
        content = self._read(self.policies_path)
        if content is None:
            return None, 0, 0
        try:
            entries = [
                PolicyEntry(
                    PolicyName(row["kind"], row["namespace"], row["name"]),
                    base64.b64decode(row["document"], validate=True),
                    _where(row["origin"]),
                    tuple((str(path), _where(at)) for path, at in row["rule_origins"]),
                    int(row["revision"]),
                )
                for row in content["policies"]
            ]
            return entries, int(content["revision"]), int(content["store_id"])
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            self._set_aside(self.policies_path, error)
            return None, 0, 0

    def _load_identities(self) -> list[IdentityEntry]:
        content = self._read(self.identities_path)
        if content is None:
            return []
        try:
            return [
                IdentityEntry(NumericIdentity(int(number)), Labels.from_canonical(text.encode()))
                for number, text in content["identities"].items()
            ]
        except (KeyError, TypeError, ValueError, AttributeError, LabelError) as error:
            self._set_aside(self.identities_path, error)
            return []

    def _read(self, path: Path) -> Any:
        try:
            content = statefile.read_json(path)
        except statefile.StateFileDamaged as error:
            self._set_aside(path, error)
            return None
        if content is not None and content.get("version") != _VERSION:
            self._set_aside(path, ValueError(f"version {content.get('version')} is not known"))
            return None
        return content

    def _set_aside(self, path: Path, error: Exception) -> None:
        kept = statefile.set_aside(path)
        self.damaged.append(f"{path} is damaged ({error}); it was kept as {kept}")

    def save_policies(self, entries: list[PolicyEntry], *, revision: int, store_id: int) -> None:
        content = {
            "version": _VERSION,
            "revision": revision,
            "store_id": store_id,
            "policies": [
                {
                    "kind": entry.name.kind,
                    "namespace": entry.name.namespace,
                    "name": entry.name.name,
                    "revision": entry.revision,
                    "origin": entry.origin,
                    "rule_origins": entry.rule_origins,
                    "document": base64.b64encode(entry.document).decode(),
                }
                for entry in sorted(entries, key=lambda entry: entry.name)
            ],
        }
        # On one line, as below.
        statefile.write(self.policies_path, json.dumps(content).encode() + b"\n")

    def save_identities(self, entries: dict[NumericIdentity, Labels]) -> None:
        content = {
            "version": _VERSION,
            "identities": {
                str(number): labels.canonical().decode() for number, labels in entries.items()
            },
        }
        # On one line: a long set is written often, and indenting takes the slow encoder.
        statefile.write(self.identities_path, json.dumps(content).encode() + b"\n")
