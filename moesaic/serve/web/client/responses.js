/** Parsers for the server's responses: answers, pieces of streamed answers, and errors. */

import * as errors from "./errors.js";

const ERROR_BY_STATUS = new Map([
  [401, errors.Unauthorized],
  [403, errors.Forbidden],
  [404, errors.NotFound],
  [408, errors.TimedOut],
  [413, errors.TooLarge],
  [429, errors.Overloaded],
  [502, errors.Unavailable],
  [503, errors.Unavailable],
  [504, errors.TimedOut],
]);

/**
 * Returns the error that a response with an error status describes.
 * @param {number} status
 * @param {Headers} headers
 * @param {string} body
 */
export function responseError(status, headers, body) {
  let content = null;
  try {
    content = JSON.parse(body);
  } catch {
    // A proxy may send an HTML page; the status is enough then.
  }
  const error = errorOf(status, content);
  error.retryAfter = parseRetryAfter(headers.get("retry-after"));
  error.requestId = headers.get("x-request-id");
  return error;
}

/** Returns the error that an event in a stream describes. @param {any} content */
export function eventError(content) {
  const code = content.error?.code === "context_length_exceeded" ? 400 : content.error?.code;
  return errorOf(Number.isInteger(code) && code >= 400 && code < 600 ? code : 500, content);
}

/** Returns the error for JSON in OpenAI's or TGI's format. @param {number} status @param {any} content */
function errorOf(status, content) {
  const details = typeof content?.error === "string" ? { message: content.error } : (content?.error ?? {});
  const message = String(details.message ?? `the server answered with status ${status}`);
  let error;
  if (status === 400 && typeof details.param === "string") {
    const prefix = `${details.param}: `;
    error = new errors.InvalidParameter(details.param, message.startsWith(prefix) ? message.slice(prefix.length) : message);
  } else {
    const other = status < 500 ? errors.InvalidRequest : errors.MoesaicError;
    error = new (ERROR_BY_STATUS.get(status) ?? other)(message);
  }
  error.status = status;
  return error;
}

/**
 * Returns the seconds of a Retry-After header, which holds seconds or a date; null if it is missing or invalid.
 * @param {string | null} value
 */
export function parseRetryAfter(value) {
  if (value === null) return null;
  const seconds = /^\d+(\.\d+)?$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, seconds) : null;
}

/**
 * Returns `parser(content)`. Throws BadReply if the JSON does not have the expected structure.
 * @template T
 * @param {(content: any) => T} parser
 * @param {any} content
 */
export function parse(parser, content) {
  try {
    return parser(content);
  } catch (error) {
    if (error instanceof errors.MoesaicError) throw error;
    throw new errors.BadReply(`the response does not follow the OpenAI API (${error.message})`);
  }
}

/** @param {any} value */
function requireList(value) {
  if (!Array.isArray(value)) throw new TypeError("a list is missing");
  return value;
}

/** Returns the answer of a chat or text completion, including its alternatives. @param {any} content */
export function parseAnswer(content) {
  const choices = [...requireList(content.choices)].sort((a, b) => a.index - b.index);
  const [first, ...alternatives] = choices.map((choice) => {
    const message = choice.message ?? { content: choice.text };
    const calls = (message.tool_calls ?? []).map((call) => ({ id: call.id, ...call.function }));
    return completeAnswer({
      text: message.content ?? "",
      reason: String(choice.finish_reason),
      usage: content.usage ?? null,
      calls,
      logprobs: choice.logprobs ? parseLogprobs(choice.logprobs) : null,
      raw: content,
    });
  });
  return { ...first, alternatives };
}

/** Adds the fields that follow from the others. @param {any} fields */
export function completeAnswer({ text, reason, usage, calls, logprobs, raw }) {
  const message = { role: "assistant", content: text };
  if (calls.length > 0) {
    message.tool_calls = calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  }
  const { id = "", model = "" } = raw;
  return { text, reason, usage, calls, logprobs, message, id, model, requestId: null, alternatives: [], raw };
}

/** Returns log-probabilities in the format of chat completions or of text completions. @param {any} content */
function parseLogprobs(content) {
  if ("content" in content) {
    return (content.content ?? []).map(({ token, logprob, top_logprobs: top }) => ({
      token,
      logprob,
      top: (top ?? []).map((entry) => ({ token: entry.token, logprob: entry.logprob })),
    }));
  }
  return content.tokens.map((token, index) => ({
    token,
    logprob: content.token_logprobs[index],
    top: Object.entries(content.top_logprobs?.[index] ?? {}).map(([other, logprob]) => ({ token: other, logprob })),
  }));
}

/** Returns the pieces in one event of a chat or text completion. @param {any} chunk */
export function parsePieces(chunk) {
  return (chunk.choices ?? []).map((choice) => {
    const delta = choice.delta ?? { content: choice.text };
    return {
      text: delta.content ?? "",
      index: choice.index,
      calls: (delta.tool_calls ?? []).map((call) => ({
        place: call.index,
        id: call.id ?? "",
        name: call.function?.name ?? "",
        arguments: call.function?.arguments ?? "",
      })),
      logprobs: choice.logprobs ? parseLogprobs(choice.logprobs) : [],
      reason: choice.finish_reason ?? null,
    };
  });
}

/** @param {any} content */
export function parseModels(content) {
  return requireList(content.data).map((raw) => ({
    id: raw.id,
    context: raw.max_model_len ?? null,
    task: raw.task ?? "chat",
    state: raw.state ?? "loaded",
    raw,
  }));
}

/** @param {any} content */
export function parseEmbeddings(content) {
  const rows = [...requireList(content.data)].sort((a, b) => a.index - b.index);
  return { vectors: rows.map((row) => row.embedding), model: content.model, usage: content.usage ?? null, raw: content };
}

/** @param {any} content */
export function parseTokens(content) {
  const { tokens, token_strs: texts, max_model_len: context } = content;
  return { ids: requireList(tokens), texts: texts ?? [], context: context ?? null, raw: content };
}
