"""Kopf operator: compiles TenantPolicy resources and pushes scheduler configs to engine pods.

What it knows (every replica):

    lister, reflector, handlers      lists and watches; Kopf's for policies and pools
    cache, secret_cache, tombstones  what was seen: `objects`, `observed`; `signals` tell that it changed

    kube, login                      every other request to the API server, and as whom
    secret_references, issuer        which Secrets are wanted; how tokens of ServiceAccounts are verified

What it decides (pure, from what was seen, in any order of arrival):

    assignment, foreign              which pods are whose, and which pools another installation serves
    reconcile                        what should be enforced, and what becomes of every policy
    conditions, rollout              what statuses say; which revision is current, and who has it

What it does (one replica, the leader, for a `term`):

    lease, replica                   who leads, under which epoch
    documents, offer, signing_key    what each pool's pods are to enforce, signed
    pusher, pod_link, engine_client  brought to each pod and kept there; `canary` first; `pod_prover`, `pod_report`,
                                     `overtaken`: what a pod says, and how far it is believed
    bootstrap_store                  kept for new pods and the next leader
    reporter, status_writer, events  told to whoever looks

What it runs on: `cli`, `settings`, `web_server` with `metrics`, `clock`, `debounce`.
"""
