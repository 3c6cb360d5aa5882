"""Resources: the kinds of objects that the operator asks for, as the API server names them in paths."""

from typing import NamedTuple


class Resource(NamedTuple):
    """A kind of objects, as it is named in paths."""

    api_version: str
    kind: str
    plural: str

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """Path of a collection (of all namespaces, where none is given) or of an object."""
        root = "/api" if "/" not in self.api_version else "/apis"
        within = ["namespaces", namespace] if namespace else []
        parts = [root, self.api_version, *within, self.plural, name, subresource]
        return "/".join(part for part in parts if part)


TENANT_POLICIES = Resource("evenhand.dev/v1alpha1", "TenantPolicy", "tenantpolicies")
ENGINE_POOLS = Resource("evenhand.dev/v1alpha1", "EnginePool", "enginepools")
SECRETS = Resource("v1", "Secret", "secrets")
PODS = Resource("v1", "Pod", "pods")
NAMESPACES = Resource("v1", "Namespace", "namespaces")
EVENTS = Resource("v1", "Event", "events")
LEASES = Resource("coordination.k8s.io/v1", "Lease", "leases")
