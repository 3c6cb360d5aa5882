{{/* What `evenhand serve` and `evenhand sidecar` are both told. Of {root, name, pool}. */}}
{{- define "evenhand.commonArguments" -}}
- "--host=::" # both families, whichever the cluster has
- --port=8000
- "--admin-host=::" # the network policy lets only the operator in, and it signs what it sends
- --admin-port=9000
- --pool={{ .pool.namespace }}/{{ .name }} # documents of another pool are refused
- --bootstrap=/etc/evenhand/bootstrap
- --pod-token=/etc/evenhand/identity/token
- --last-good=/var/lib/evenhand/last-good.json
- --drain-timeout={{ int .pool.drainSeconds }}
{{- end }}

{{- define "evenhand.lastArguments" -}}
{{- if .pool.tls.secretName }}
- --ssl-certfile=/etc/evenhand/tls/tls.crt
- --ssl-keyfile=/etc/evenhand/tls/tls.key
{{- end }}
{{- with .pool.args }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "evenhand.commonMounts" -}}
- {name: bootstrap, mountPath: /etc/evenhand/bootstrap, readOnly: true}
- {name: identity, mountPath: /etc/evenhand/identity, readOnly: true}
- {name: state, mountPath: /var/lib/evenhand}
- {name: cache, mountPath: /var/cache/evenhand}
- {name: tmp, mountPath: /tmp}
{{- if .pool.tls.secretName }}
- {name: tls, mountPath: /etc/evenhand/tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "evenhand.environment" -}}
- {name: HOME, value: /var/cache/evenhand}
- {name: XDG_CACHE_HOME, value: /var/cache/evenhand}
- {name: CUPY_CACHE_DIR, value: /var/cache/evenhand/cupy}
{{- if .pool.hub.enabled }}
{{ include "evenhand.hubEnvironment" . }}
{{- end }}
{{- with .pool.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A mirror of the hub, and a token for gated models. */}}
{{- define "evenhand.hubEnvironment" -}}
- name: HF_ENDPOINT
  valueFrom: {secretKeyRef: {name: {{ .pool.hub.secret }}, key: endpoint, optional: true}}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .pool.hub.secret }}, key: token, optional: true}}
{{- end }}

{{- define "evenhand.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Our engine. */}}
{{- define "evenhand.engineContainers" -}}
{{- $cuda := eq .pool.device "cuda" }}
{{- $probe := dict "path" "/ready" "port" "http" }}
{{- $health := dict "path" "/health" "port" "http" }}
{{- if .pool.tls.secretName }}
{{- $_ := set $probe "scheme" "HTTPS" }}
{{- $_ := set $health "scheme" "HTTPS" }}
{{- end }}
{{- with .pool.hub.fetch }}
initContainers:
  - name: fetch
    image: {{ $.root.Values.image.registry }}/engine:{{ include "evenhand.tag" $.root }}{{ if $cuda }}-cuda{{ end }}
    {{- include "evenhand.pullPolicy" $.root | nindent 4 }}
    command: [sh, -c]
    args: # the mark comes last: what was cut short is gone on with
      - |-
        test -e /models/.fetched && exit
        python -c 'import os, huggingface_hub as hub; from evenhand_engine.model.source import HUB_FILES as names;
        hub.snapshot_download(os.environ["MODEL"], local_dir="/models", allow_patterns=names)' && touch /models/.fetched
    env:
      - {name: MODEL, value: {{ . | quote }}}
      - {name: HOME, value: /tmp}
      {{- include "evenhand.hubEnvironment" $ | nindent 6 }}
    resources:
      requests: {cpu: 200m, memory: 512Mi}
      limits: {memory: 2Gi}
    securityContext: {{- include "evenhand.restricted" . | nindent 6 }}
    volumeMounts:
      - {name: model, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
{{- end }}
containers:
  - name: engine
    image: {{ .root.Values.image.registry }}/engine:{{ include "evenhand.tag" .root }}{{ if $cuda }}-cuda{{ end }}
    {{- include "evenhand.pullPolicy" .root | nindent 4 }}
    command: [evenhand, serve]
    args:
      {{- with .pool.model }}
      - {{ . | quote }}
      {{- end }}
      {{- include "evenhand.commonArguments" . | nindent 6 }}
      {{- if $cuda }}
      - --device=cuda # or it does not start: on its host's cores it would look healthy and be 100 times slower
      {{- if gt (int .pool.gpus) 1 }}
      - --tensor-parallel-size={{ int .pool.gpus }}
      {{- end }}
      {{- end }}
      {{- include "evenhand.lastArguments" . | nindent 6 }}
    env: {{- include "evenhand.environment" . | nindent 6 }}
    ports:
      - {name: http, containerPort: 8000}
      - {name: admin, containerPort: 9000}
    startupProbe: # to load weights and compile kernels
      httpGet: {{- toYaml $probe | nindent 8 }}
      periodSeconds: 2
      failureThreshold: {{ div .pool.startupSeconds 2 }}
    livenessProbe: # 200 only while the loop makes progress
      httpGet: {{- toYaml $health | nindent 8 }}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 6
    readinessProbe:
      httpGet: {{- toYaml $probe | nindent 8 }}
      periodSeconds: 2
      timeoutSeconds: 2
      failureThreshold: 2
    lifecycle:
      preStop:
        sleep: {seconds: 10} # until no proxy sends new requests here; SIGTERM then drains what is running
    resources:
      {{- $resources := deepCopy .pool.resources }}
      {{- if $cuda }}
      {{- $_ := set $resources "limits" (merge (dict .pool.gpuResource (int .pool.gpus | toString)) ($resources.limits | default dict)) }}
      {{- end }}
      {{- toYaml $resources | nindent 6 }}
    securityContext: {{- include "evenhand.restricted" . | nindent 6 }}
    volumeMounts:
      {{- include "evenhand.commonMounts" . | nindent 6 }}
      {{- if .pool.modelVolume }}
      - {name: model, mountPath: /models, readOnly: true}
      {{- end }}
{{- end }}

{{/* Another engine on 127.0.0.1:8001, and our native sidecar, which starts before it and ends after it. */}}
{{- define "evenhand.sidecarContainers" -}}
initContainers:
  - name: evenhand-sidecar
    image: {{ .root.Values.image.registry }}/engine:{{ include "evenhand.tag" .root }}
    {{- include "evenhand.pullPolicy" .root | nindent 4 }}
    restartPolicy: Always
    command: [evenhand, sidecar]
    args:
      - --upstream=http://127.0.0.1:8001
      {{- include "evenhand.commonArguments" . | nindent 6 }}
      {{- include "evenhand.lastArguments" . | nindent 6 }}
    env: {{- include "evenhand.environment" . | nindent 6 }}
    ports:
      - {name: http, containerPort: 8000}
      - {name: admin, containerPort: 9000}
    startupProbe: # not the engine's health: the engine starts when this container has
      tcpSocket: {port: http}
      periodSeconds: 1
      failureThreshold: 60
    readinessProbe: # the engine's too
      httpGet: {path: /ready, port: http{{ if .pool.tls.secretName }}, scheme: HTTPS{{ end }}}
      periodSeconds: 2
      timeoutSeconds: 2
      failureThreshold: 2
    lifecycle:
      preStop: # at once with the engine's, which waits for the end of this drain; SIGTERM comes when the engine has ended
        exec: # 10 s until no proxy sends new requests here
          command: [sh, -c, sleep 10; kill -USR1 1]
    resources: {{- toYaml .pool.resources | nindent 6 }}
    securityContext: {{- include "evenhand.restricted" . | nindent 6 }}
    volumeMounts: {{- include "evenhand.commonMounts" . | nindent 6 }}
containers:
  {{- $drained := dict "lifecycle" (dict "preStop" (dict "httpGet" (dict "path" "/drained" "port" 9000))) }}
  - {{- toYaml (merge $drained .pool.sidecar.engine) | nindent 4 }}
{{- end }}
