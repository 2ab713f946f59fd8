/** Ask a Moesaic server, or another that speaks OpenAI's dialect. */

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
}

export interface ToolCall {
  id: string;
  name: string;
  /** What the model wrote: JSON if it kept to its task. */
  arguments: string;
}

/** A part of a call: call number `place` of an answer gets more `arguments`. Later parts have neither id nor name. */
export interface CallPiece extends ToolCall {
  place: number;
}

export interface TokenLogprob {
  token: string;
  /** Natural; null: the first token of a prompt, which follows from nothing. */
  logprob: number | null;
  /** The likeliest tokens at its place. */
  top: { token: string; logprob: number }[];
}

/** What has come of an answer since the last piece. */
export interface Piece {
  text: string;
  /** Which of `n` answers it is a piece of. */
  index: number;
  calls: CallPiece[];
  logprobs: TokenLogprob[];
  /** Why the answer has ended, if it has. */
  reason: string | null;
}

/** A turn of a conversation, as the API has it. */
export interface Message {
  role: "system" | "developer" | "user" | "assistant" | "tool";
  content: string | null | { type: "text"; text: string }[];
  name?: string;
  tool_calls?: { id: string; type: "function"; function: { name: string; arguments: string } }[];
  tool_call_id?: string;
}

/** A conversation, or one question. */
export type Messages = string | readonly Message[];

export interface Answer {
  text: string;
  /** "stop" (the model ended it, or a stop string or its grammar did), "length", or "tool_calls". */
  reason: string;
  /** Of all `n` answers together; null if the server does not say. */
  usage: Usage | null;
  /** The tools that it calls, in order. */
  calls: ToolCall[];
  /** Of its tokens, if they were asked for. */
  logprobs: TokenLogprob[] | null;
  /** The answer as a turn, to be put at the end of the conversation before the next question. */
  message: Message;
  id: string;
  model: string;
  /** What the server's log calls the request. */
  requestId: string | null;
  /** With `n` > 1, the other n - 1 answers. */
  alternatives: Answer[];
  /** What the server sent; of a stream, the fields of its events, each as it came last. */
  raw: Record<string, any>;
}

export interface Model {
  id: string;
  /** How many tokens prompt and answer may have together. */
  context: number | null;
  task: string;
  state: string;
  raw: Record<string, any>;
}

export interface Embeddings {
  /** One for each text, in order. */
  vectors: number[][];
  model: string;
  usage: Pick<Usage, "prompt_tokens" | "total_tokens"> | null;
  raw: Record<string, any>;
}

export interface Tokens {
  ids: number[];
  texts: string[];
  /** How many tokens the model can hold. */
  context: number | null;
  raw: Record<string, any>;
}

/** How to answer: the API's fields, under its names. */
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
  min_tokens?: number;
  ignore_eos?: boolean;
  /** So many alternatives to each token, with their log-probabilities; 0 is the tokens' own alone. */
  logprobs?: number;
  response_format?: Record<string, any>;
  structured_outputs?: Record<string, any>;
  priority?: number;
  user?: string;
  /** Whether to hand out pieces as they come. */
  stream?: boolean;
  /** An abort closes the connection, and the server stops computing. */
  signal?: AbortSignal;
  /** Fields that are not among these. */
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

export interface Retries {
  /** In all; 1 is once. Default 4. */
  tries: number;
  /** Instead, for a stream each time that it breaks after it has begun or gone on, unless `tries` is 1. Default 12. */
  resumes: number;
  /** From the first failure on: what would have to wait longer fails now. Default 120. */
  seconds: number;
  /** Waits are random, between 0 and `first` * 2**i seconds, on top of what Retry-After says. Default 0.5. */
  first: number;
  /** The most that they grow to. Default 8. */
  longest: number;
}

/** How long to wait, in seconds; Infinity is for ever. */
export interface Timeouts {
  /** For the answer to begin; one that is no stream begins when it is done. Default 600; Node itself waits 300. */
  firstByte: number;
  /** For more of an answer that has begun; a server that still computes sends a comment now and then. Default 60. */
  silence: number;
}

export interface ClientOptions {
  /** With or without `/v1`. Default: what MOESAIC_BASE_URL says, else http://127.0.0.1:8000. */
  baseUrl?: string;
  /** The API key. Default: MOESAIC_API_KEY. In a page, everybody can read it who can open the page. */
  key?: string;
  /** Is asked where a call names none. */
  model?: string;
  timeouts?: Partial<Timeouts>;
  retries?: Partial<Retries>;
  /** Are sent with every request. */
  headers?: Record<string, string>;
  /** To be used instead of the global one. */
  fetch?: typeof fetch;
}

/** A server to ask. Every call may fail with any of the errors below, or with its signal's reason. */
export class Client {
  constructor(options?: ClientOptions);
  /** Answers a conversation. */
  chat(messages: Messages, options: ChatOptions & { stream: true }): Stream;
  chat(messages: Messages, options?: ChatOptions & { stream?: false }): Promise<Answer>;
  /** Goes on from a text, or from token ids. */
  complete(prompt: string | readonly number[], options: CompleteOptions & { stream: true }): Stream;
  complete(prompt: string | readonly number[], options?: CompleteOptions & { stream?: false }): Promise<Answer>;
  /** Lists the models that can be asked. */
  models(options?: { signal?: AbortSignal }): Promise<Model[]>;
  /** Makes a vector of each text. */
  embed(
    texts: string | readonly string[],
    options?: { model?: string; dimensions?: number; signal?: AbortSignal },
  ): Promise<Embeddings>;
  /** Tells the tokens of a text, or of a conversation as the model reads it. */
  tokenize(text: Messages, options?: { model?: string; signal?: AbortSignal }): Promise<Tokens>;
}

/**
 * An answer as it comes. It is asked for when the iteration begins; leaving the loop early closes the connection, and
 * the server stops computing.
 */
export class Stream implements AsyncIterable<Piece> {
  private constructor();
  /** What has come so far, of the first answer if there are several. */
  readonly text: string;
  /** How often the connection broke and another one went on. */
  readonly resumed: number;
  [Symbol.asyncIterator](): AsyncGenerator<Piece, void, void>;
  /** Returns the whole answer; what has not come yet is waited for. */
  answer(): Promise<Answer>;
  /** Takes no more of it: whoever waits for the next piece gets the reason. */
  abort(reason?: unknown): void;
}

export class MoesaicError extends Error {
  /** The HTTP status of the answer, or the one that the error would have. */
  status: number;
  /** Seconds after which another try makes sense, where the server says so. */
  retryAfter: number | null;
  /** What the server's log calls the request. */
  requestId: string | null;
}
/** What was asked cannot be done as asked. */
export class InvalidRequest extends MoesaicError {}
/** One named value is out of range or of the wrong kind. */
export class InvalidParameter extends InvalidRequest {
  constructor(param: string, message: string);
  readonly param: string;
}
/** More bytes than the server takes in at once. */
export class TooLarge extends InvalidRequest {}
/** No key, or one that is not known. */
export class Unauthorized extends MoesaicError {}
/** Not with this key, or not from this page. */
export class Forbidden extends MoesaicError {}
/** No such model, or no such route. */
export class NotFound extends MoesaicError {}
/** The queue is full, or the key's share is used up: try again later. */
export class Overloaded extends MoesaicError {}
/** The server is loading, stopping, or waited too long for its turn: try again later. */
export class Unavailable extends MoesaicError {}
/** The answer took longer than the server allows, or than this client waits for it to begin. */
export class TimedOut extends MoesaicError {}
/** The server could not be reached, or hung up before it answered. */
export class ConnectionFailed extends MoesaicError {}
/** An answer broke off, and there is no going on with it: what came of it is not the whole. */
export class StreamBroken extends ConnectionFailed {}
/** Asked for the rest of an answer, the server told another one: what came of the first is not the whole. */
export class AnswerChanged extends StreamBroken {}
/** What was sent is no answer of the API. */
export class BadReply extends MoesaicError {}
