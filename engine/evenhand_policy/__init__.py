"""The contract between operator and engine: TenantPolicy resources, their compiler, and SchedulerConfig.

Imports the standard library, msgspec and PyYAML only, so that both sides can load it cheaply. From what people write to what an
engine enforces, in this order:

    documents, files          YAML with the line of each field (`yaml_reader`, `resource_files`); or objects from the API server
    decode, schema            an object becomes a resource, or the one problem that is in the way (`errors`)
    spec, pool, secret        the resources: TenantPolicy, EnginePool, and the Secrets that they refer to; `identity_spec`, how a
                              tenant is known; `labels` select
    compile                   all policies of a pool, in the order of their age, the older has what both claim, by
        membership, grants    whether a policy may be the pool's, and what it may claim there
        identities            what nobody else may claim too: tenant names, keys (`credentials`), ServiceAccounts, headers
        resolve               defaults and units
    config                    the result: SchedulerConfig, one document for each pool
    compact, push_document    its one JSON form, and how it is sent and stored; `version` is the order of all that was sent
    push_protocol             the operator's requests, signed, and how an engine verifies them; `signatures` its keys and the
                              engines' answers; `bootstrap`, what is mounted before anybody pushes
    status                    what comes back: conditions of policies and pools
    lint                      the same before anything is applied: what the operator would say of some files
"""
