/**
 * The errors that a call can raise. An abort is the exception: it raises the reason of its signal.
 * The names are those of Python's `moesaic.errors`.
 */

export class MoesaicError extends Error {
  /** HTTP status of the response, or the status that fits the error. */
  status = 500;
  /** Seconds to wait before another try, if the server sent Retry-After. @type {number | null} */
  retryAfter = null;
  /** The request's id in the server's log. @type {string | null} */
  requestId = null;

  /** @param {string} message @param {ErrorOptions} [options] */
  constructor(message, options) {
    super(message, options);
    this.name = "MoesaicError";
  }
}

/** The request is invalid. */
export class InvalidRequest extends MoesaicError {
  name = "InvalidRequest";
  status = 400;
}

/** A parameter has the wrong type or is out of range. */
export class InvalidParameter extends InvalidRequest {
  name = "InvalidParameter";

  /** @param {string} param @param {string} message */
  constructor(param, message) {
    super(`${param}: ${message}`);
    this.param = param;
  }
}

/** The request body exceeds the server's limit. */
export class TooLarge extends InvalidRequest {
  name = "TooLarge";
  status = 413;
}

/** The API key is missing or unknown. */
export class Unauthorized extends MoesaicError {
  name = "Unauthorized";
  status = 401;
}

/** The API key or the origin of the page has no permission. */
export class Forbidden extends MoesaicError {
  name = "Forbidden";
  status = 403;
}

/** The model or the route does not exist. */
export class NotFound extends MoesaicError {
  name = "NotFound";
  status = 404;
}

/** The queue is full or the key's quota is used up. Try again later. */
export class Overloaded extends MoesaicError {
  name = "Overloaded";
  status = 429;
}

/** The server is loading or stopping, or the request waited too long in the queue. Try again later. */
export class Unavailable extends MoesaicError {
  name = "Unavailable";
  status = 503;
}

/** The answer took longer than the server's or the client's time limit. */
export class TimedOut extends MoesaicError {
  name = "TimedOut";
  status = 504;
}

/** The server cannot be reached, or the connection broke before the response. */
export class ConnectionFailed extends MoesaicError {
  name = "ConnectionFailed";
  status = 502;
}

/** The connection broke during an answer, and the answer could not be resumed. The text until then is incomplete. */
export class StreamBroken extends ConnectionFailed {
  name = "StreamBroken";
}

/** The server sent a different answer when the stream was resumed. The text until then is incomplete. */
export class AnswerChanged extends StreamBroken {
  name = "AnswerChanged";
}

/** The response does not follow the API. */
export class BadReply extends MoesaicError {
  name = "BadReply";
  status = 502;
}
