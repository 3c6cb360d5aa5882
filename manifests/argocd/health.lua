-- Health of a TenantPolicy or an EnginePool for Argo CD. It follows kstatus but for a
-- pool without pods, so that Flux and kubectl wait agree with it.
local health = { status = "Progressing", message = "waiting for the operator" }

if obj.metadata.deletionTimestamp ~= nil then
  health.message = "being deleted"
  return health
end

local status = obj.status or {}
if status.observedGeneration == nil then
  return health
end
if status.observedGeneration ~= obj.metadata.generation then
  health.message = "the operator has not seen this generation yet"
  return health
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end

local stalled, ready = conditions.Stalled, conditions.Ready
if stalled ~= nil and stalled.status == "True" then
  health.status, health.message = "Degraded", stalled.message
elseif ready ~= nil and (ready.observedGeneration or obj.metadata.generation) ~= obj.metadata.generation then
  health.message = "the condition Ready is that of an older generation"
elseif ready ~= nil and (ready.status == "True" or ready.reason == "NoPods") then
  -- a pool comes before its engines: a sync that waited for them to be there would never get to them
  health.status, health.message = "Healthy", ready.message
elseif ready ~= nil then
  health.message = ready.message
end
return health
