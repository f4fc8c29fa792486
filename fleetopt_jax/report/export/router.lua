-- Sends a request to the first pool whose window holds prompt and answer. Above: POOLS, LENGTH, BY_PREFIX.
--
-- Prompt tokens: the header x-prompt-tokens (of a gateway that counts), else the bytes of the body over BYTES_PER_TOKEN.
-- Output tokens: the header x-output-tokens (of a gateway that predicts), else the request's own limit, else
-- OUTPUT_IF_UNSAID. Where that is nil the last pool serves it: the only one that holds whatever it becomes.
local BYTES_PER_TOKEN = 4 -- EDIT for your text. Fewer send more to longer pools; too many, and vLLM answers 400
local MOST_BYTES_PER_TOKEN = 16 -- hardly any text has more: what is too long even so is refused here, the rest by vLLM
local OUTPUT_IF_UNSAID = nil
-- Where BY_PREFIX, prompts that begin alike go to one instance. They do where x-prefix-key (of a gateway that knows its
-- sessions) is the same, else the request's prompt_cache_key, else the first message of the user and what is before it,
-- of each of which this many bytes count, as of a prompt without messages. A later turn of a conversation has the same.
local PREFIX_BYTES = 4096 -- EDIT. Fewer bring more prompts together, more tell apart what shares a long beginning

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

local function beginning(text)
  local key = text:match('"prompt_cache_key"%s*:%s*"([^"]+)"')
  if key then
    return key
  end
  local _, first = text:find('"messages"%s*:%s*%[')
  if first then
    local user = text:find('"role"%s*:%s*"user"', first) or first
    local last = text:find('[^\\]"%s*}', user) or #text
    local before = text:sub(first, math.min(user, first + PREFIX_BYTES) - 1)
    return before .. text:sub(user, math.min(last, user + PREFIX_BYTES))
  end
  for _, name in ipairs({"prompt", "input"}) do
    _, first = text:find('"' .. name .. '"%s*:%s*')
    if first then
      local last = text:find('[^\\]"%s*[,}]', first) or #text
      return text:sub(first + 1, math.min(last, first + PREFIX_BYTES))
    end
  end
end

local function hash(text) -- two bytes at a time; 2^32 * 65599 is exact in a double
  local h = #text % 2 == 1 and text:byte(#text) + 1 or 0
  for i = 1, #text - 1, 2 do
    local a, b = text:byte(i, i + 1)
    h = (h * 65599 + a * 256 + b) % 4294967291
  end
  return string.format("%.0f", h)
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
  headers:remove("x-fleetopt-prefix")
  local key = BY_PREFIX and (headers:get("x-prefix-key") or text and beginning(text))
  if key then -- else any instance
    headers:replace("x-fleetopt-prefix", hash(key))
  end
end
