/** The public names; index.d.ts says what each is. */

export { Client, Stream } from "./client.js";
export * from "./errors.js";
