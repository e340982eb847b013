"""The names of log fields, so that one thing is called the same in every line of every service."""

from typing import Final

# The line itself
TIME: Final = "time"
LEVEL: Final = "level"
SERVICE: Final = "service"
MESSAGE: Final = "msg"
ERROR: Final = "error"
CURE: Final = "cure"
DURATION_S: Final = "duration_s"
PID: Final = "pid"
VERSION: Final = "version"
SIGNAL: Final = "signal"
EXIT_CODE: Final = "exit_code"
LOGGER: Final = "logger"
LINE: Final = "line"

# Controllers, reconcilers, tables
CONTROLLER: Final = "controller"
RECONCILER: Final = "reconciler"
FAILURES: Final = "failures"
PART: Final = "part"
TABLE: Final = "table"
ROWS: Final = "rows"
KEY: Final = "key"
REVISION: Final = "revision"
COUNT: Final = "count"
LOST: Final = "lost"

# RPC
METHOD: Final = "method"
CODE: Final = "code"
PEER: Final = "peer"
SOCKET: Final = "socket"
ADDRESS: Final = "address"

# Endpoints and identities
ENDPOINT_ID: Final = "endpoint_id"
ENDPOINT_NAME: Final = "endpoint_name"
ENDPOINT_STATE: Final = "endpoint_state"
IDENTITY: Final = "identity"
OLD_IDENTITY: Final = "old_identity"
IDENTITY_LABELS: Final = "identity_labels"
LABELS: Final = "labels"
NAMESPACE: Final = "namespace"
NODE: Final = "node"
IPV4: Final = "ipv4"
IPV6: Final = "ipv6"
PREFIX: Final = "prefix"
MAC: Final = "mac"
REASON: Final = "reason"

# Policy
POLICY_REVISION: Final = "policy_revision"
POLICY_NAME: Final = "policy_name"
POLICY_KIND: Final = "policy_kind"
RULE_ID: Final = "rule_id"
FAULTS: Final = "faults"

# The kernel
NETNS: Final = "netns"
INTERFACE: Final = "interface"
IFINDEX: Final = "ifindex"
MAP: Final = "map"
PROGRAM: Final = "program"
OBJECT: Final = "object"
HOOK: Final = "hook"
ATTACH_MODE: Final = "attach_mode"
FEATURE: Final = "feature"
PATH: Final = "path"

# xDS
STREAM: Final = "stream"
TYPE_URL: Final = "type_url"
RESOURCE: Final = "resource"
PORT: Final = "port"

# The store
LEASE_ID: Final = "lease_id"
LEASE_TTL_S: Final = "lease_ttl_s"
BACKEND: Final = "backend"
