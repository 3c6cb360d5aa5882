{{/* Metadata of one object. Of {root, name, namespace, labels, wave, annotations}; the waves are Argo CD's. */}}
{{- define "evenhand.metadata" -}}
name: {{ .name }}
{{- with .namespace }}
namespace: {{ . }}
{{- end }}
labels:
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  app.kubernetes.io/instance: {{ .root.Release.Name }}
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
  helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
annotations:
  argocd.argoproj.io/sync-wave: {{ .wave | quote }}
  {{- with .annotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* The pools by name, each with the defaults filled in and with `engine`, from which the names of its objects follow. */}}
{{- define "evenhand.pools" -}}
{{- range $name, $own := .Values.pools }}
{{- $pool := mergeOverwrite (deepCopy $.Values.poolDefaults) $own }}
{{- range list "cacheVolume" "modelVolume" "strategy" }}
{{- if hasKey $own . }}
{{- $_ := set $pool . (get $own .) }}{{/* of which two together would be none */}}
{{- end }}
{{- end }}
{{- $_ := set $pool "engine" (eq $name "default" | ternary "evenhand-engine" (printf "evenhand-engine-%s" $name)) }}
{{- if and $pool.sidecar.enabled (not $pool.sidecar.engine) }}
{{- fail (printf "pools.%s.sidecar.engine is empty: it is the container of the engine behind the sidecar" $name) }}
{{- end }}
{{- if and $pool.hpa.enabled $pool.keda.enabled }}
{{- fail (printf "pools.%s has hpa and keda: one of them scales it" $name) }}
{{- end }}
{{- if and $pool.hub.fetch (not (and $pool.hub.enabled $pool.modelVolume)) }}
{{- fail (printf "pools.%s.hub.fetch needs hub.enabled, and a modelVolume to fetch onto" $name) }}
{{- end }}
{{- if and $pool.tls.issuerRef (not $pool.tls.secretName) }}
{{- $_ := set $pool.tls "secretName" (printf "%s-tls" $pool.engine) }}
{{- end }}
{{ $name }}:
  {{- toYaml $pool | nindent 2 }}
{{- end }}
{{- end }}

{{/* The namespaces of the pools, each once. */}}
{{- define "evenhand.namespaces" -}}
{{- $namespaces := list }}
{{- range $name, $pool := include "evenhand.pools" . | fromYaml }}
{{- $namespaces = append $namespaces $pool.namespace }}
{{- end }}
{{- $namespaces | uniq | sortAlpha | toYaml }}
{{- end }}

{{- define "evenhand.tag" -}}
{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* Where pods of the operator and of engines find names. */}}
{{- define "evenhand.dnsRule" -}}
- to:
    - namespaceSelector:
        matchExpressions:
          - key: kubernetes.io/metadata.name
            operator: In
            values: {{- toYaml .Values.networkPolicy.dnsNamespaces | nindent 14 }}
    {{- with .Values.networkPolicy.nodeLocalDns }}
    - ipBlock: {cidr: {{ . }}}
    {{- end }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
    - {port: 5353, protocol: UDP}
    - {port: 5353, protocol: TCP}
{{- end }}

{{/* Pull settings of a container. */}}
{{- define "evenhand.pullPolicy" -}}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{/* Where a pod may run and how important it is. Of the operator's values or of a pool. */}}
{{- define "evenhand.placement" -}}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "evenhand.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
