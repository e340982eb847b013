"""Redirects to Envoy's resources: pure functions, from rules that policies wrote to messages.

    Redirect ── check ──▶ RuleSet ── rbac ──▶ RouteConfiguration   what may pass; changes often
        │                    └────── headers ─────┘
        └──────────────────── listener ─────────▶ Listener          plumbing; denies by itself
                              clusters ─────────▶ Clusters          to the original destination
                              tls ──────────────▶ Secrets, Cluster  when rules open TLS

`translate.translate()` is the way in. What cannot be expressed, or is larger than the proxy takes,
raises `RuleRefused`, which names the rule.
"""
