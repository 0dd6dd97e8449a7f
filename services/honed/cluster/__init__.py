"""What the command line knows of a run on Kubernetes: its API, its Pods, a way to them, its Secrets. Needs no torch.

Whoever operates a run, bound to the Role honed-operator, needs just this:

    (core)       pods                      list
    (core)       events                    list
    (core)       pods/portforward          get, create
    (core)       configmaps                get, of honed-run
    (core)       secrets                   get, of honed-token-operator, honed-token-application and honed-redis
    (core)       secrets                   get, of honed-tls-operator
    apps         deployments               get
    apps         statefulsets              get
    apps         deployments/scale         patch, of honed-generation and honed-reward
    autoscaling  horizontalpodautoscalers  list

Port-forward over a WebSocket is a GET, authorised as `get`; Kubernetes 1.35 asks for `create` as well (KEP-4006).
`honed cluster secrets` and `honed check --cluster` are for whoever installs a run: they read and make more Secrets.
"""
