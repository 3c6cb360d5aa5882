"""The sidecar: identity, quota and fair dispatch before an engine that somebody else wrote.

Lives in the HTTP process, on its event loop; with `--api-server-count` above 1, requests are passed on in API servers, processes
of their own, and owned by another. Owns what one proxied request holds until it ends; the door is `frontend`'s, the
queue `dispatch`'s, the connection to the engine `backends`'. Bytes that need not be understood are not.

    passing                 one request from end to end: identity, quota, queue, then its exchange with the upstream
    passage                 the same with its body made ready and its answer counted, and its ticket, closed whatever happens
    ticket                  what it holds of quota, queue and metrics, given back exactly once; whoever gives tickets out
    one ticket, two ends    ticket; or remote_tickets ──channel, messages──▶ ticket_keeper, who holds the tickets
    exchange                the HTTP exchange itself: the request as it goes, the answer as it comes; cancelled with its client
    intake, skeleton        its body as it comes in: of what is large, no more than can be read in one go
    body, sampling, members what the request is by its body: prompts, users; choices and limits; its members
    counting                how many tokens its prompt has
    relay, chunks, events   the answer's bytes handed on as they come; what is read of them in passing
    front                   what a process at the public port has
    service                 what all requests share, in the process that owns it
"""
