export type Kind = 'apple' | 'pear' | 'plum';

export interface Fruit {
  readonly kind: Kind;
  readonly grams: number;
  readonly picked: Date;
}

export class Basket<T extends Fruit = Fruit> implements Iterable<T> {
  readonly #fruits: T[] = [];

  add(...fruits: T[]): this {
    this.#fruits.push(...fruits);
    return this;
  }

  get grams(): number {
    return this.#fruits.reduce((sum, { grams }) => sum + grams, 0);
  }

  *[Symbol.iterator](): IterableIterator<T> {
    yield* this.#fruits;
  }
}

export function isKind(text: string): text is Kind {
  return ['apple', 'pear', 'plum'].includes(text);
}
