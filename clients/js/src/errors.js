/**
 * Every error that a call can end with, but for an abort, which is the signal's own reason.
 * Named as in Python's `moesaic.errors`.
 */

export class MoesaicError extends Error {
  /** The HTTP status of the answer, or the one that the error would have. */
  status = 500;
  /** Seconds after which another try makes sense, where the server says so. @type {number | null} */
  retryAfter = null;
  /** What the server's log calls the request. @type {string | null} */
  requestId = null;

  /** @param {string} message @param {ErrorOptions} [options] */
  constructor(message, options) {
    super(message, options);
    this.name = "MoesaicError";
  }
}

/** What was asked cannot be done as asked. */
export class InvalidRequest extends MoesaicError {
  name = "InvalidRequest";
  status = 400;
}

/** One named value is out of range or of the wrong kind. */
export class InvalidParameter extends InvalidRequest {
  name = "InvalidParameter";

  /** @param {string} param @param {string} message */
  constructor(param, message) {
    super(`${param}: ${message}`);
    this.param = param;
  }
}

/** More bytes than the server takes in at once. */
export class TooLarge extends InvalidRequest {
  name = "TooLarge";
  status = 413;
}

/** No key, or one that is not known. */
export class Unauthorized extends MoesaicError {
  name = "Unauthorized";
  status = 401;
}

/** Not with this key, or not from this page. */
export class Forbidden extends MoesaicError {
  name = "Forbidden";
  status = 403;
}

/** No such model, or no such route. */
export class NotFound extends MoesaicError {
  name = "NotFound";
  status = 404;
}

/** The queue is full, or the key's share is used up: try again later. */
export class Overloaded extends MoesaicError {
  name = "Overloaded";
  status = 429;
}

/** The server is loading, stopping, or waited too long for its turn: try again later. */
export class Unavailable extends MoesaicError {
  name = "Unavailable";
  status = 503;
}

/** The answer took longer than the server allows, or than this client waits for it to begin. */
export class TimedOut extends MoesaicError {
  name = "TimedOut";
  status = 504;
}

/** The server could not be reached, or hung up before it answered. */
export class ConnectionFailed extends MoesaicError {
  name = "ConnectionFailed";
  status = 502;
}

/** An answer broke off, and there is no going on with it: what came of it is not the whole. */
export class StreamBroken extends ConnectionFailed {
  name = "StreamBroken";
}

/** Asked for the rest of an answer, the server told another one: what came of the first is not the whole. */
export class AnswerChanged extends StreamBroken {
  name = "AnswerChanged";
}

/** What was sent is no answer of the API. */
export class BadReply extends MoesaicError {
  name = "BadReply";
  status = 502;
}
