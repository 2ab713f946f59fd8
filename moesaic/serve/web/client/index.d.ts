/** Client for Moesaic servers and other servers with an OpenAI-compatible API. */

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
}

export interface ToolCall {
  id: string;
  name: string;
  /** The text that the model wrote; normally JSON. */
  arguments: string;
}

/** A part of a streamed tool call. The first part has the id and the name; in later parts both are empty. */
export interface CallPiece extends ToolCall {
  /** Index of the tool call within its answer. */
  place: number;
}

export interface TokenLogprob {
  token: string;
  /** Natural logarithm; null for the first token of a prompt, which has no context. */
  logprob: number | null;
  /** The most likely tokens at this position. */
  top: { token: string; logprob: number }[];
}

/** The part of a streamed answer that arrived since the previous piece. */
export interface Piece {
  text: string;
  /** Index of the answer, from 0 to `n` - 1. */
  index: number;
  calls: CallPiece[];
  logprobs: TokenLogprob[];
  /** Finish reason; null while the answer continues. */
  reason: string | null;
}

/** A message of a conversation, in the API's format. */
export interface Message {
  role: "system" | "developer" | "user" | "assistant" | "tool";
  content: string | null | { type: "text"; text: string }[];
  name?: string;
  tool_calls?: { id: string; type: "function"; function: { name: string; arguments: string } }[];
  tool_call_id?: string;
}

/** A conversation, or one user message. */
export type Messages = string | readonly Message[];

export interface Answer {
  text: string;
  /** Finish reason: "stop" (end of text, stop string or end of the grammar), "length" or "tool_calls". */
  reason: string;
  /** Tokens of all `n` answers together; null if the server does not report them. */
  usage: Usage | null;
  /** The tool calls, in order. */
  calls: ToolCall[];
  /** Log-probabilities of the answer's tokens; null unless requested. */
  logprobs: TokenLogprob[] | null;
  /** The answer as an assistant message, to append to the conversation. */
  message: Message;
  id: string;
  model: string;
  /** The request's id in the server's log. */
  requestId: string | null;
  /** The other n - 1 answers, if `n` > 1. */
  alternatives: Answer[];
  /** The server's JSON. For a stream: the fields of all events, each with its latest value. */
  raw: Record<string, any>;
}

export interface Model {
  id: string;
  /** Context length in tokens: the maximum for prompt and answer together. */
  context: number | null;
  task: string;
  state: string;
  /** The server's JSON for this model. */
  raw: Record<string, any>;
}

export interface Embeddings {
  /** One vector for each text, in order. */
  vectors: number[][];
  model: string;
  usage: Pick<Usage, "prompt_tokens" | "total_tokens"> | null;
  /** The server's JSON. */
  raw: Record<string, any>;
}

export interface Tokens {
  ids: number[];
  texts: string[];
  /** Context length of the model in tokens. */
  context: number | null;
  /** The server's JSON. */
  raw: Record<string, any>;
}

/** Generation options under the API's names. */
export interface Options {
  model?: string;
  max_tokens?: number;
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  typical_p?: number;
  repetition_penalty?: number;
  frequency_penalty?: number;
  presence_penalty?: number;
  logit_bias?: Record<string, number>;
  seed?: number;
  n?: number;
  stop?: string | readonly string[];
  stop_token_ids?: readonly number[];
  bad_words?: readonly string[];
  allowed_token_ids?: readonly number[];
  /** Keep only this number of the last tokens of the prompt; -1: as many as leave room for the answer. */
  truncate_prompt_tokens?: number;
  min_tokens?: number;
  ignore_eos?: boolean;
  speculation?: boolean;
  /** Returns log-probabilities, with this number of alternatives for each token; 0 returns no alternatives. */
  logprobs?: number;
  response_format?: Record<string, any>;
  structured_outputs?: Record<string, any>;
  priority?: number;
  user?: string;
  /** Whether to return the pieces of the answer as they arrive. */
  stream?: boolean;
  /** An abort closes the connection, and the server stops computing. */
  signal?: AbortSignal;
  /** Fields that this interface does not list. */
  extra?: Record<string, unknown>;
}

export interface ChatOptions extends Options {
  tools?: readonly Record<string, any>[];
  tool_choice?: string | Record<string, any>;
  parallel_tool_calls?: boolean;
  continue_final_message?: boolean;
}

export interface CompleteOptions extends Options {
  echo?: boolean;
  best_of?: number;
}

/** Retry policy: exponential back-off with full jitter. */
export interface Retries {
  /** Total number of tries; 1 disables retries. Default 4. */
  tries: number;
  /**
   * Number of tries for a stream that breaks after it has begun, counted again after each new piece. A stream has also
   * begun when the server accepts it and can replay it. Default 12, or 1 if `tries` is 1.
   */
  resumes: number;
  /** Maximum seconds from the first failure to the next try. Default 120. */
  seconds: number;
  /** The wait is a random time between 0 and `first` * 2**i seconds; Retry-After is added to it. Default 0.5. */
  first: number;
  /** Upper bound of `first` * 2**i in seconds. Default 8. */
  longest: number;
}

/** Timeouts in seconds; Infinity waits forever. */
export interface Timeouts {
  /** Until the response begins; without streaming it begins when it is complete. Default 600; Node's own limit is 300. */
  firstByte: number;
  /** Between two reads of a response. The server sends keep-alive comments while it computes. Default 60. */
  silence: number;
}

export interface ClientOptions {
  /** Server address, with or without `/v1`. Default: MOESAIC_BASE_URL, else http://127.0.0.1:8000. */
  baseUrl?: string;
  /** API key. Default: MOESAIC_API_KEY. Visitors of a page can read a key that the page contains. */
  key?: string;
  /** Model of calls that name none. */
  model?: string;
  timeouts?: Partial<Timeouts>;
  retries?: Partial<Retries>;
  /** Headers of every request. */
  headers?: Record<string, string>;
  /** Used instead of the global fetch. */
  fetch?: typeof fetch;
}

/** Client of one server. Every call may throw any of the errors below, or the reason of its signal. */
export class Client {
  constructor(options?: ClientOptions);
  /** Returns the answer to a conversation. */
  chat(messages: Messages, options: ChatOptions & { stream: true }): Stream;
  chat(messages: Messages, options?: ChatOptions & { stream?: false }): Promise<Answer>;
  /** Returns the continuation of a text or of token ids. */
  complete(prompt: string | readonly number[], options: CompleteOptions & { stream: true }): Stream;
  complete(prompt: string | readonly number[], options?: CompleteOptions & { stream?: false }): Promise<Answer>;
  /** Returns the models that the server offers. */
  models(options?: { signal?: AbortSignal }): Promise<Model[]>;
  /** Returns one vector for each text. */
  embed(
    texts: string | readonly string[],
    options?: { model?: string; dimensions?: number; signal?: AbortSignal },
  ): Promise<Embeddings>;
  /** Returns the tokens of a text, or of a conversation after the chat template. */
  tokenize(text: Messages, options?: { model?: string; signal?: AbortSignal }): Promise<Tokens>;
}

/**
 * Async iterable of the pieces of an answer. The request is sent when the iteration begins. If the loop is left early,
 * the connection is closed and the server stops computing.
 */
export class Stream implements AsyncIterable<Piece> {
  private constructor();
  /** The text of the first answer, as received until now. */
  readonly text: string;
  /** Latest token counts that the server reported; null before the first ones. */
  readonly usage: Usage | null;
  /** Headers of the latest response; null before the first one. */
  readonly headers: Headers | null;
  /** Number of times that the connection broke and a new one continued the answer. */
  readonly resumed: number;
  [Symbol.asyncIterator](): AsyncGenerator<Piece, void, void>;
  /** Reads the stream to its end and returns the complete answer. */
  answer(): Promise<Answer>;
  /** Stops reading and closes the connection. A pending read rejects with the reason. */
  abort(reason?: unknown): void;
}

export class MoesaicError extends Error {
  /** HTTP status of the response, or the status that fits the error. */
  status: number;
  /** Seconds to wait before another try, if the server sent Retry-After. */
  retryAfter: number | null;
  /** The request's id in the server's log. */
  requestId: string | null;
}
/** The request is invalid. */
export class InvalidRequest extends MoesaicError {}
/** A parameter has the wrong type or is out of range. */
export class InvalidParameter extends InvalidRequest {
  constructor(param: string, message: string);
  readonly param: string;
}
/** The request body exceeds the server's limit. */
export class TooLarge extends InvalidRequest {}
/** The API key is missing or unknown. */
export class Unauthorized extends MoesaicError {}
/** The API key or the origin of the page has no permission. */
export class Forbidden extends MoesaicError {}
/** The model or the route does not exist. */
export class NotFound extends MoesaicError {}
/** The queue is full or the key's quota is used up. Try again later. */
export class Overloaded extends MoesaicError {}
/** The server is loading or stopping, or the request waited too long in the queue. Try again later. */
export class Unavailable extends MoesaicError {}
/** The answer took longer than the server's or the client's time limit. */
export class TimedOut extends MoesaicError {}
/** The server cannot be reached, or the connection broke before the response. */
export class ConnectionFailed extends MoesaicError {}
/** The connection broke during an answer, and the answer could not be resumed. The text until then is incomplete. */
export class StreamBroken extends ConnectionFailed {}
/** The server sent a different answer when the stream was resumed. The text until then is incomplete. */
export class AnswerChanged extends StreamBroken {}
/** The response does not follow the API. */
export class BadReply extends MoesaicError {}
