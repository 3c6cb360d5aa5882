"""The sidecar: identity, quota and fair dispatch before an engine that somebody else wrote.

Lives in the HTTP process, on its event loop. Owns what one proxied request holds until it ends; the door is `frontend`'s, the
queue `dispatch`'s, the connection to the engine `backends.upstream`'s. Bytes that need not be understood are not.
"""
