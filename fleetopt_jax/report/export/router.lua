-- Sends a request to the first pool whose window holds prompt and answer. Above: POOLS, LENGTH.
--
-- Prompt tokens: the header x-prompt-tokens (of a gateway that counts), else the bytes of the body over BYTES_PER_TOKEN.
-- Output tokens: the header x-output-tokens (of a gateway that predicts), else the request's own limit, else
-- OUTPUT_IF_UNSAID. Where that is nil the last pool serves it: the only one that holds whatever it becomes.
local BYTES_PER_TOKEN = 4 -- EDIT for your text. Fewer send more to longer pools; too many, and vLLM answers 400
local MOST_BYTES_PER_TOKEN = 16 -- hardly any text has more: what is too long even so is refused here, the rest by vLLM
local OUTPUT_IF_UNSAID = nil

local function whole(text)
  local number = text and text:match("^%s*(%d+)%s*$")
  return number and tonumber(number)
end

local LIMITS = {"max_completion_tokens", "max_tokens", "max_output_tokens"} -- the first is vLLM's choice of two

local function limit(text)
  for _, name in ipairs(LIMITS) do -- a name inside of a text has a backslash before its last quote
    local number = text and text:match('"' .. name .. '"%s*:%s*(%d[%d.eE+]*)')
    if number then
      return tonumber(number)
    end
  end
end

function envoy_on_request(handle)
  local body = handle:body() -- waits for all of it: what was got before is no longer valid
  local headers = handle:headers()
  local bytes = body and body:length() or 0
  local text = bytes > 0 and body:getBytes(0, bytes) or nil
  local counted = whole(headers:get("x-prompt-tokens"))
  local output = whole(headers:get("x-output-tokens")) or limit(text) or OUTPUT_IF_UNSAID
  local last = POOLS[#POOLS]
  local at_least = (counted or math.floor(bytes / MOST_BYTES_PER_TOKEN)) + (output or 1)
  if text and at_least > last.longest then
    local message = string.format("%.0f tokens or more (%s); the longest request is one of %d", at_least, LENGTH, last.longest)
    handle:respond(
      {[":status"] = "400", ["content-type"] = "application/json"},
      '{"error":{"message":"' .. message .. '","type":"BadRequestError","param":null,"code":400}}\n'
    )
    return
  end
  local pool = last
  if text and output then
    local total = (counted or math.ceil(bytes / BYTES_PER_TOKEN)) + output
    for _, each in ipairs(POOLS) do -- shortest first
      if total <= each.longest then
        pool = each
        break
      end
    end
  end
  headers:replace("x-fleetopt-pool", pool.name)
end
