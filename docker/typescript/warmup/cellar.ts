import type { Fruit, Kind } from './fruit';
import { totals } from './harvest';

type Shelf<K extends Kind> = Map<string, Fruit & { kind: K }>;
type Shelves = { [K in Kind]: Shelf<K> };
type Listener<A extends unknown[]> = (...what: A) => void;

function logged<This, A extends unknown[], R>(
  method: (this: This, ...given: A) => R,
  context: { name: string | symbol },
): (this: This, ...given: A) => R {
  return function (this: This, ...given: A): R {
    const result = method.apply(this, given);
    if (result === undefined) throw new Error(`${String(context.name)} found nothing`);
    return result;
  };
}

export class Cellar {
  private readonly listeners = new Set<Listener<[label: string, fruit: Fruit]>>();
  private readonly shelves: Shelves = { apple: new Map(), pear: new Map(), plum: new Map() };

  store<K extends Kind>(label: string, fruit: Fruit & { kind: K }): void {
    const shelf = this.shelves[fruit.kind] as Shelf<K>;
    shelf.set(label, fruit);
    this.listeners.forEach((listener) => listener(label, fruit));
  }

  @logged
  find(label: string): Fruit | undefined {
    return Object.values(this.shelves)
      .map((shelf) => shelf.get(label))
      .find((fruit) => fruit !== undefined);
  }

  stock(): Record<Kind, number> {
    const all = Object.values(this.shelves).flatMap((shelf): Fruit[] => [...shelf.values()]);
    return { apple: 0, pear: 0, plum: 0, ...totals(all) };
  }

  onStored(listener: Listener<[string, Fruit]>): () => boolean {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }
}
