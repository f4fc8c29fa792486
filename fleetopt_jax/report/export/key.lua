-- vLLM's own router, before pools of two stages, asks its instances with a key of its own, whoever asks it. So clients'
-- keys are looked at here, by VLLM_API_KEY of this process; where that is not set whoever comes is served.
local KEY = os.getenv("VLLM_API_KEY")

function envoy_on_request(handle)
  if KEY and KEY ~= "" and handle:headers():get("authorization") ~= "Bearer " .. KEY then
    handle:respond(
      {[":status"] = "401", ["content-type"] = "application/json"},
      '{"error":{"message":"Unauthorized","type":"AuthenticationError","param":null,"code":401}}\n'
    )
  end
end
