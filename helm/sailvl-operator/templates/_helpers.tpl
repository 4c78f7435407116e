{{- define "sailvl.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "sailvl.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "sailvl.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "sailvl.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* Names of cluster-wide objects. They include the namespace, because a release of the same name may exist in another one. */ -}}
{{- define "sailvl.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "sailvl.fullname" .) -}}
{{- end -}}

{{- define "sailvl.selector" -}}
app.kubernetes.io/name: {{ include "sailvl.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* managed-by must not be `sailvl-operator`, which marks the workers. */ -}}
{{- define "sailvl.labels" -}}
{{ include "sailvl.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- define "sailvl.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "sailvl.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "sailvl.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* NetworkPolicyPeer of Prometheus, as JSON; empty if its namespace isn't set. */ -}}
{{- define "sailvl.prometheusPeer" -}}
{{- with .Values.networkPolicy.prometheus.namespace -}}
{{- toJson (dict
      "namespaceSelector" (dict "matchLabels" (dict "kubernetes.io/metadata.name" .))
      "podSelector" (dict "matchLabels" (default (dict "app.kubernetes.io/name" "prometheus") $.Values.networkPolicy.prometheus.podLabels))) -}}
{{- end -}}
{{- end -}}

{{- /* NetworkPolicyPeers that may connect to the metrics port of workers, as JSON: the operator and Prometheus. */ -}}
{{- define "sailvl.metricsPeers" -}}
{{- $peers := list (dict
      "namespaceSelector" (dict "matchLabels" (dict "kubernetes.io/metadata.name" .Release.Namespace))
      "podSelector" (dict "matchLabels" (fromYaml (include "sailvl.selector" .)))) -}}
{{- with include "sailvl.prometheusPeer" . -}}
{{- $peers = append $peers (fromJson .) -}}
{{- end -}}
{{- toJson $peers -}}
{{- end -}}

{{- /* Flags of the operator, one per value; see `sailvl operator --help`. */ -}}
{{- define "sailvl.args" -}}
- operator
{{- with .Values.watchNamespaces }}
- --namespaces={{ join "," . }}
{{- end }}
- --lease-name={{ include "sailvl.fullname" . }}
- --lease-namespace={{ .Release.Namespace }}
{{- with .Values.leaderElection }}
- --lease-duration-seconds={{ .durationSeconds }}
- --lease-renew-deadline-seconds={{ .renewDeadlineSeconds }}
- --lease-renew-interval-seconds={{ .renewIntervalSeconds }}
{{- end }}
{{- with .Values.runs }}
{{- with .trainerImage }}
- --trainer-image={{ . }}
{{- end }}
- --grace-seconds={{ int64 .graceSeconds }}
- --failure-settle-seconds={{ .failureSettleSeconds }}
- --backoff-seconds={{ .backoffSeconds }}
- --backoff-limit-seconds={{ .backoffLimitSeconds }}
{{- end }}
- --network-policies={{ .Values.networkPolicy.runs }}
- --metrics-peers={{ include "sailvl.metricsPeers" . }}
{{- with .Values.allowed }}
{{- with .images }}
- --allowed-images={{ join "," . }}
{{- end }}
{{- with .priorityClasses }}
- --allowed-priority-classes={{ join "," . }}
{{- end }}
{{- with .tolerationKeys }}
- --allowed-toleration-keys={{ join "," . }}
{{- end }}
{{- with .serviceAccounts }}
- --allowed-service-accounts={{ join "," . }}
{{- end }}
{{- with .serverHosts }}
- --allowed-server-hosts={{ join "," . }}
{{- end }}
{{- end }}
{{- with .Values.operator }}
- --workers={{ int64 .workers }}
- --progress-interval-seconds={{ .progressIntervalSeconds }}
- --diagnostics-interval-seconds={{ .diagnosticsIntervalSeconds }}
- --watch-audit-interval-seconds={{ .watchAuditIntervalSeconds }}
- --events={{ .events }}
- --log-level={{ .logLevel }}
- --log-format={{ .logFormat }}
{{- end }}
- --metrics-port=8080
{{- end -}}

{{- /* Permissions of the operator on runs and the objects that they own. */ -}}
{{- define "sailvl.rules" -}}
- apiGroups: [sailvl.dev]
  resources: [sailvlruns]
  verbs: [get, list, watch, patch, delete] # patch removes the restart annotation; delete is for ttlSecondsAfterFinished
- apiGroups: [sailvl.dev]
  resources: [sailvlruns/status]
  verbs: [patch]
# Owned objects set blockOwnerDeletion, which some clusters allow only with this permission.
- apiGroups: [sailvl.dev]
  resources: [sailvlruns/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, deletecollection]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, create]
- apiGroups: [""]
  resources: [events]
  verbs: [create, list]
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list]
{{- end -}}

{{- define "sailvl.subject" -}}
- kind: ServiceAccount
  name: {{ include "sailvl.serviceAccount" . }}
  namespace: {{ .Release.Namespace }}
{{- end -}}
