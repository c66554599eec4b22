"""Control of a running machine from outside: the verbs, the line protocol, its client."""
