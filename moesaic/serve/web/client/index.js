/** Public names of the client; index.d.ts documents them. */

export { Client, Stream } from "./client.js";
export * from "./errors.js";
